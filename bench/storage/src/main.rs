//! Strake beside its peers: both sides in turn in one run, on the same machine, with the same
//! client. `cargo xtask bench NAME` builds and calls this.
//!
//! One folder per bench. Each prints what it measured as a table and ends with one line of JSON
//! (see `report.rs`).

mod observations;
mod report;
mod signals;
mod storage;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use strake_observe::{Style, render};

/// Measures Strake beside its peers.
#[derive(Debug, Parser)]
#[command(name = "strake-bench")]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Live migration of a disk: our methods and QEMU's mirror.
    Storage {
        /// A smaller disk and fewer runs: under eight minutes.
        #[arg(long)]
        quick: bool,
        /// The directory for both images; on the device to be measured.
        #[arg(long)]
        dir: Option<PathBuf>,
        /// Runs of each side at each load, instead of the usual number.
        #[arg(long)]
        rounds: Option<u32>,
        /// Only this load (idle, 1000, 4000, 16000 or max).
        #[arg(long)]
        load: Option<String>,
        /// Only this side (strake-auto, strake-dirty, strake-mirror, peer-background or
        /// peer-write-blocking); may be given again.
        #[arg(long = "side")]
        sides: Vec<String>,
        /// The disk's size in MiB, instead of the usual one.
        #[arg(long)]
        size_mib: Option<u64>,
        /// Only this part.
        #[arg(long, value_enum, default_value = "all")]
        part: storage::Part,
    },
    /// Serves an image over vhost-user-blk until standard input ends: our side of the data path.
    #[command(hide = true)]
    ServeDisk {
        /// The image.
        image: PathBuf,
        /// The socket.
        socket: PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.bench {
        Bench::Storage {
            quick,
            dir,
            rounds,
            load,
            sides,
            size_mib,
            part,
        } => {
            let mut settings = storage::Settings::new(if quick {
                storage::Extent::Quick
            } else {
                storage::Extent::Full
            });
            settings.part = part;
            settings.dir = dir;
            settings.load = load;
            settings.sides = sides;
            settings.rounds = rounds.unwrap_or(settings.rounds).max(1);
            settings.size = size_mib.map_or(settings.size, |mib| mib.max(16) << 20);
            storage::run(&settings)
        }
        Bench::ServeDisk { image, socket } => storage::serve_disk(&image, &socket),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(seen) => {
            let style = if std::io::stderr().is_terminal() {
                Style::Terminal
            } else {
                Style::Plain
            };
            eprint!("{}", render(&seen, style));
            ExitCode::FAILURE
        }
    }
}
