//! `strake-demo`: what Strake is for, in two minutes. `cargo xtask demo` brings it to a host whose
//! KVM runs stock kernels.
//!
//! A guest with Debian's own kernel stamps its disk without pause and answers over one TCP
//! connection, while the disk moves to another datastore. Then everything is verified thrice: by
//! the guest itself, by the same rules from outside, and by a checksum that both sides take.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use strake_system_tests::check;
use strake_system_tests::failure::{Failure, Outcome, While};
use strake_system_tests::host::Host;
use strake_system_tests::load::{Connection, Stamps, number, verify_image};
use strake_system_tests::process::{run, terminal};
use strake_system_tests::vm::{DISK, Shape, Vm};

/// So slow that one can watch it, even on a fast disk.
const RATE: &str = "24M";
const DISK_SIZE: &str = "128M";
/// What the guest writes before the migration, so that there is something to move, in MiB.
const FILLED_MIB: u32 = 96;
/// How long the load goes on before and after the migration.
const SETTLE: Duration = Duration::from_secs(2);
const CHECKSUM: Duration = Duration::from_secs(120);
/// Set to the terminal's width if somebody watches.
const COLUMNS: &str = "STRAKE_DEMO_COLUMNS";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let method = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => "auto",
        ["--method", method] => method,
        _ => {
            eprintln!("usage: strake-demo [--method METHOD]");
            return ExitCode::from(2);
        }
    };
    match demo(method) {
        Ok(()) => {
            println!("demo: ok");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            println!("{failure}\ndemo: FAILED");
            ExitCode::FAILURE
        }
    }
}

/// Prints a step as it begins.
fn step(text: &str) {
    println!("==> {text}");
    let _ = std::io::stdout().flush();
}

fn demo(method: &str) -> Outcome {
    let mut table = Vec::new();

    step("a host: straked with two datastores, a and b, on file systems of their own");
    let mut host = Host::start("demo")?;
    print!("{}", host.strake(&["datastore", "ls"])?.good()?);

    step("a guest: Debian's own kernel, 2 vCPUs, its disk on a");
    let shape = Shape {
        cpus: 2,
        disk: DISK_SIZE,
        ..Shape::default()
    };
    let begun = Instant::now();
    let vm = Vm::boot(&mut host, shape)?;
    let up = begun.elapsed();
    let kernel = vm.guest().sh("uname -r", SETTLE * 10)?;
    print!("{}", host.strake(&["ps"])?.good()?);
    table.push((
        "guest",
        format!(
            "Linux {kernel}, answers {:.1} s after create",
            up.as_secs_f64()
        ),
    ));

    step(
        "its load: four writers that stamp, sync and verify blocks, and a TCP connection from outside",
    );
    vm.guest().sh(
        &format!("dd if=/dev/urandom of=/dev/vda bs=1M count={FILLED_MIB} conv=fsync"),
        CHECKSUM,
    )?;
    let connection = Connection::open(vm.guest())?;
    let stamps = Stamps::start(vm.guest(), "")?;
    thread::sleep(SETTLE);
    println!("{} writes acknowledged so far", stamps.writes()?);

    step(&format!(
        "strake disk migrate {} {DISK} --to b --method {method} --rate {RATE} --remove-source",
        vm.name
    ));
    let source = vm.image(&host)?;
    migrate(&host, &vm, method)?;
    let job = last_job(&host)?;
    let image = vm.image(&host)?;
    check!(
        image.starts_with(host.store("b")) && !source.exists(),
        "the disk is on {}, and {} {}",
        image.display(),
        source.display(),
        if source.exists() {
            "is still there"
        } else {
            "is gone"
        }
    );
    table.extend(told(&job)?);

    step("the guest goes on, on b; then it verifies all it wrote");
    stamps.go_on()?;
    thread::sleep(SETTLE);
    let verdict = stamps.end()?;
    println!("{verdict}");
    let count = |key| number(&verdict, key).unwrap_or_default();
    let slowest = field(&verdict, "max_write_ms=");
    table.push((
        "guest's writes",
        format!(
            "{} acknowledged and verified, 0 errors, the slowest took {slowest} ms",
            count("writes=")
        ),
    ));
    let echoed = connection.close()?;
    println!("{echoed}");
    table.push((
        "TCP connection",
        format!(
            "the same all the time: {} answers, the slowest after {} ms",
            field(&echoed, "n="),
            field(&echoed, "worst_ms=")
        ),
    ));

    step("from outside, after the guest's shutdown");
    let inside = vm.guest().sh(
        "sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/vda",
        CHECKSUM,
    )?;
    vm.shut_down(&host)?;
    println!("{}", verify_image(&image)?.trim_end());
    let image = image.display().to_string();
    let outside = run(Command::new("sha256sum").arg(&image))?.good()?;
    let (inside, outside) = (first_word(&inside), first_word(&outside));
    println!("sha256 in the guest   {inside}\nsha256 of the image   {outside}");
    check!(
        !inside.is_empty() && inside == outside,
        "the image on b is not what the guest read"
    );
    table.push((
        "image on b",
        "every stamped sector as it must be; its checksum is the guest's".to_owned(),
    ));

    println!();
    for (what, seen) in table {
        println!("  {what:<16} {seen}");
    }
    Ok(())
}

/// Migrates as a user does; on a terminal, if there is one, so that the progress is seen.
fn migrate(host: &Host, vm: &Vm, method: &str) -> Outcome {
    let mut client = host.command();
    client.args(["disk", "migrate", &vm.name, DISK, "--to", "b"]);
    client.args(["--method", method, "--rate", RATE, "--remove-source"]);
    let columns = std::env::var(COLUMNS)
        .ok()
        .and_then(|text| text.parse().ok());
    let status = match columns {
        Some(columns) => {
            let (ours, theirs) = terminal(columns)?;
            client
                .stdin(Stdio::null())
                .stdout(theirs.try_clone()?)
                .stderr(theirs);
            let mut child = client.spawn().doing("starting strake")?;
            // The command holds the terminal's other end, which shall close with the program.
            drop(client);
            pass_on(File::from(ours));
            child.wait()?
        }
        None => client.status().doing("starting strake")?,
    };
    check!(status.success(), "the migration failed: {status}");
    Ok(())
}

/// Copies what a program writes to its terminal. The end of that is an error on Linux.
fn pass_on(mut from: File) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let mut out = std::io::stdout().lock();
        let bytes = buffer.get(..count).unwrap_or_default();
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }
}

fn last_job(host: &Host) -> Outcome<Value> {
    let jobs = host.json(&["jobs", "ls"])?;
    jobs.as_array()
        .and_then(|jobs| jobs.last())
        .cloned()
        .ok_or_else(|| Failure::new("the daemon knows no job"))
}

/// What a completed job has to tell.
fn told(job: &Value) -> Outcome<Vec<(&'static str, String)>> {
    let status = |key: &str| job.pointer(&format!("/status/{key}"));
    let millis = |key| status(key).and_then(Value::as_f64);
    let missing = || Failure::new(format!("the job does not say how it went: {job}"));
    let passes = status("passes")
        .and_then(Value::as_array)
        .ok_or_else(missing)?;
    let read = |pass: &Value| pass.get("read_bytes").and_then(Value::as_u64);
    let bytes: u64 = passes.iter().filter_map(read).sum();
    let pause = millis("pause_ms").ok_or_else(missing)?;
    let took = millis("elapsed_ms").ok_or_else(missing)?;
    let used = status("method").ok_or_else(missing)?;
    let used = used.get("method").and_then(Value::as_str);
    Ok(vec![
        ("method used", used.ok_or_else(missing)?.to_owned()),
        (
            "migration",
            format!(
                "{} MiB in {} passes and {:.1} s, limited to {RATE}/s",
                bytes >> 20,
                passes.len(),
                took / 1000.0
            ),
        ),
        ("pause", format!("{pause:.1} ms at the switch-over")),
    ])
}

/// The word after `key`.
fn field<'a>(line: &'a str, key: &str) -> &'a str {
    let rest = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key));
    rest.unwrap_or("?")
}

fn first_word(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or_default()
}
