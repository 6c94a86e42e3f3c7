//! The project's own commands: `cargo xtask lab`, `demo`, `test`, `bench`, `setup`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use strake_observe::{Result, Style, render};

use xtask::guest;
use xtask::lab::LabCommand;
use xtask::observations::BadFile;
use xtask::setup;
use xtask::show;
use xtask::suite::{self, Kind, Plan};
use xtask::whole::{self, Debian};

/// Strake's own commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boots a guest, moves its disk while it writes, and verifies that nothing was lost.
    Demo {
        /// How the disk is moved.
        #[arg(long, default_value = "auto", value_parser = ["auto", "dirty", "mirror"])]
        method: String,
    },
    /// Runs every test: lints, unit and property tests, fuzzers, and the whole system.
    Test(TestArguments),
    /// Measures Strake beside its peers, for example `bench storage --quick`.
    Bench {
        /// The bench and its options; `--help` lists them.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Runs a command in the lab: a KVM host of its own, whatever this machine can do.
    Lab(LabArguments),
    /// Runs the whole-system tests whose names contain a word; all without one.
    System(SystemArguments),
    /// Makes the guests that tests and demo boot, and says where they are.
    Guests,
    /// Installs the programs that the other commands need (as root, on Debian).
    Setup,
}

#[derive(Debug, clap::Args)]
struct TestArguments {
    /// Only this kind; may be given several times.
    #[arg(long, value_name = "KIND")]
    only: Vec<Kind>,
    /// Seconds for each fuzz target.
    #[arg(long, default_value_t = 60)]
    fuzz_seconds: u64,
}

#[derive(Debug, clap::Args)]
struct SystemArguments {
    /// Seconds that all of them together may take: three times what they need on an idle machine.
    #[arg(long, default_value_t = 2700)]
    timeout: u64,
    /// Parts of the tests' names.
    words: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct LabArguments {
    /// Seconds that the command may take once the lab is up.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Processors of the lab; more than one is known to hang in a few runs of a hundred.
    #[arg(long, default_value_t = 1)]
    cpus: u8,
    /// A file or folder to bring in; programs come with their libraries.
    #[arg(long = "file", value_name = "HOST:LAB")]
    files: Vec<String>,
    /// A raw image to attach as /dev/disks/NAME; what the lab writes to it is dropped.
    #[arg(long = "disk", value_name = "NAME:IMAGE")]
    disks: Vec<String>,
    /// Where what the command leaves in /out goes.
    #[arg(long)]
    out: Option<PathBuf>,
    /// The command and its arguments. A program named by its path here is brought along.
    #[arg(required = true, last = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    strake_observe::set_process_name("xtask");
    match run(Arguments::parse().command) {
        Ok(code) => code,
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

fn run(task: Task) -> Result<ExitCode> {
    let done = |()| ExitCode::SUCCESS;
    match task {
        Task::Demo { method } => show::demo(&method).map(done),
        Task::Test(arguments) => suite::run(&Plan {
            only: arguments.only,
            fuzz: Duration::from_secs(arguments.fuzz_seconds),
        })
        .map(done),
        Task::Bench { arguments } => show::bench(&arguments).map(done),
        Task::Lab(arguments) => run_in_lab(&arguments),
        Task::System(arguments) => {
            let words: Vec<String> = ["strake-system-tests".to_owned()]
                .into_iter()
                .chain(arguments.words)
                .collect();
            let debian = Debian::for_tests(words.get(1..).unwrap_or_default());
            let limit = Duration::from_secs(arguments.timeout);
            let status = whole::run(&whole::command(&words, debian, limit)?)?;
            Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
        }
        Task::Guests => {
            println!("debian: {}", guest::debian::image()?.display());
            let small = guest::small()?;
            println!(
                "small:  {} with {}",
                small.kernel.display(),
                small.initrd.display()
            );
            Ok(ExitCode::SUCCESS)
        }
        Task::Setup => setup::all().map(done),
    }
}

fn run_in_lab(arguments: &LabArguments) -> Result<ExitCode> {
    let mut command = LabCommand::new(&arguments.command);
    command.timeout = Duration::from_secs(arguments.timeout);
    command.cpus = arguments.cpus;
    command.files_out.clone_from(&arguments.out);
    for given in &arguments.files {
        let (host, place) = split(given)?;
        command.files.push((PathBuf::from(host), place.to_owned()));
    }
    for given in &arguments.disks {
        let (name, image) = split(given)?;
        command.disks.push((name.to_owned(), PathBuf::from(image)));
    }
    let status = command.run()?;
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
}

fn split(given: &str) -> Result<(&str, &str)> {
    given.split_once(':').ok_or_else(|| {
        BadFile {
            given: given.to_owned(),
            reason: "there is no ':'".to_owned(),
        }
        .into()
    })
}
