//! The command line of [`strake_guest_tools::echo`].

use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use strake_guest_tools::arguments::Arguments;
use strake_guest_tools::{echo, signal};

const HELP: &str = "\
strake-guest-echo: a TCP echo server and its client

  strake-guest-echo [ADDRESS]                  serve; default 0.0.0.0:7777
  strake-guest-echo client ADDRESS SECONDS     send a numbered line every 50 ms over one
                                               connection and check that it comes back

Options of the client:
  --connect SECONDS   how long to try to connect first (default 30)

The client ends with `echo: ok n=LINES worst_ms=LONGEST` and status 0, or with
`echo: BAD ... disconnect: REASON` and status 1. SIGTERM ends it early, and well.

Example: strake-guest-echo client 192.168.77.2:7777 60
";

fn main() -> ExitCode {
    match start() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(what) => {
            eprintln!("echo: {what}");
            ExitCode::from(2)
        }
    }
}

fn start() -> Result<bool, String> {
    let arguments = Arguments::parse(std::env::args().skip(1), &["help"], &["connect"])?;
    if arguments.has("help") {
        print!("{HELP}");
        return Ok(true);
    }
    let words: Vec<&str> = arguments.words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["client", address, seconds] => {
            let seconds = seconds
                .parse()
                .map_err(|_| format!("'{seconds}' is no number of seconds"))?;
            let patience = arguments.number("connect")?.unwrap_or(30);
            client(address, seconds, patience)
        }
        [] => serve("0.0.0.0:7777"),
        [address] if *address != "client" => serve(address),
        _ => Err("see --help".to_owned()),
    }
}

fn serve(address: &str) -> Result<bool, String> {
    let failed = |error: std::io::Error| format!("{address}: {error}");
    let listener = TcpListener::bind(address).map_err(failed)?;
    println!(
        "echo: listening on {}",
        listener.local_addr().map_err(failed)?
    );
    echo::serve(&listener).map_err(failed)?;
    Ok(true)
}

fn client(address: &str, seconds: u64, patience: u64) -> Result<bool, String> {
    signal::catch();
    let stream = connect(address, Duration::from_secs(patience))?;
    println!("echo: connected to {address}");
    let end = Instant::now() + Duration::from_secs(seconds);
    let seen = echo::client(stream, || signal::end_asked() || Instant::now() >= end);
    println!("{seen}");
    Ok(seen.lost.is_none())
}

fn connect(address: &str, patience: Duration) -> Result<TcpStream, String> {
    const AGAIN: Duration = Duration::from_millis(200);
    let end = Instant::now() + patience;
    loop {
        let tried = address.to_socket_addrs().and_then(|mut all| {
            let one = all
                .next()
                .ok_or_else(|| std::io::Error::other("no address of that name"))?;
            TcpStream::connect_timeout(&one, Duration::from_secs(5))
        });
        match tried {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= end || signal::end_asked() => {
                return Err(format!("connecting to {address}: {error}"));
            }
            Err(_) => thread::sleep(AGAIN),
        }
    }
}
