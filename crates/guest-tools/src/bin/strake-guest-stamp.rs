//! The command line of [`strake_guest_tools::stamp`].

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use strake_guest_tools::arguments::Arguments;
use strake_guest_tools::random::mix;
use strake_guest_tools::signal;
use strake_guest_tools::stamp::device::{Access, Device};
use strake_guest_tools::stamp::map::State;
use strake_guest_tools::stamp::run::{self, Discards, Plan};
use strake_guest_tools::stamp::verify;

const HELP: &str = "\
strake-guest-stamp: write to a raw disk, remember what was acknowledged, verify it

  strake-guest-stamp DISK [OPTIONS]       write and verify until SIGTERM, SIGINT, a line `stop` on
                                          standard input, or the time limit; then verify all of it
  strake-guest-stamp verify IMAGE         check what such a run left, from outside

ALL DATA ON THE DISK IS LOST.

Options:
  --seconds N       end after so many seconds
  --threads N       writers (default 4)
  --limit BYTES     use only the first so many bytes (suffix K, M, G)
  --rate N          operations a second of all writers together (default: as fast as possible)
  --checkpoint N    save what was acknowledged every N seconds, for `verify` after a crash
                    (default 10, 0 for never)
  --no-discard      the disk has no discard
  --no-hints        write-zeroes only: the disk need not read as zeroes after a discard
  --seed N          the identity of the run (default: from the clock)

It says every second
  stamp: writes=N verified=SECTORS errors=N discards=N max_write_ms=X
and at the end
  stamp: ok sectors=N writes=M ...       status 0
  stamp: BAD ... first: WHAT             status 1
After a run that did not end in order, `verify` accepts what the newest checkpoint names or
anything the run wrote later; after one that did, only the exact sectors.

Examples:
  strake-guest-stamp /dev/vdb --seconds 60
  strake-guest-stamp verify web1-data.raw
";

const OPTIONS: &[&str] = &["seconds", "threads", "limit", "rate", "checkpoint", "seed"];

fn main() -> ExitCode {
    match start() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(what) => {
            println!("stamp: BAD {what}");
            ExitCode::from(2)
        }
    }
}

fn start() -> Result<bool, String> {
    let flags = ["help", "no-discard", "no-hints"];
    let arguments = Arguments::parse(std::env::args().skip(1), &flags, OPTIONS)?;
    if arguments.has("help") {
        print!("{HELP}");
        return Ok(true);
    }
    let words: Vec<&str> = arguments.words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["verify", image] => check(image),
        ["verify"] | [] => Err("which disk? see --help".to_owned()),
        [disk] => write(disk, &arguments),
        _ => Err("see --help".to_owned()),
    }
}

fn open(path: &str, access: Access) -> Result<Device, String> {
    Device::open(Path::new(path), access).map_err(|error| format!("{path}: {error}"))
}

fn write(disk: &str, arguments: &Arguments) -> Result<bool, String> {
    let clock = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(0));
        mix(now ^ u64::from(std::process::id()) << 32)
    };
    let plan = Plan {
        threads: arguments.number("threads")?.unwrap_or(4).clamp(1, 64),
        run: arguments.number("seed")?.unwrap_or_else(clock),
        time: arguments.number("seconds")?.map(Duration::from_secs),
        limit: arguments.number("limit")?,
        rate: arguments.number("rate")?,
        checkpoint: match arguments.number("checkpoint")? {
            Some(0) => None,
            Some(seconds) => Some(Duration::from_secs(seconds)),
            None => Some(Duration::from_secs(10)),
        },
        discards: if arguments.has("no-discard") {
            Discards::No
        } else if arguments.has("no-hints") {
            Discards::ZeroesOnly
        } else {
            Discards::Yes
        },
    };
    signal::catch();
    run::run(open(disk, Access::Write)?, plan)
}

fn check(image: &str) -> Result<bool, String> {
    let device = open(image, Access::Read)?;
    let (saved, report) = verify::image(&device).map_err(|error| format!("{image}: {error}"))?;
    for bad in &report.faults {
        println!("stamp: bad {bad}");
    }
    let map = match saved.state {
        State::Complete => "complete",
        State::Checkpoint | State::Begun => "checkpoint",
    };
    let counts = format!(
        "sectors={} zeroes={} map={map} generation={} run={:#x}",
        report.stamped, report.zeroes, saved.generation, saved.run
    );
    if report.bad == 0 {
        println!("stamp: ok {counts}");
    } else {
        println!(
            "stamp: BAD bad={} torn_blocks={} {counts}",
            report.bad, report.torn
        );
    }
    Ok(report.bad == 0)
}
