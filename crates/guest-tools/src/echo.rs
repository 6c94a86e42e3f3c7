//! An echo server, and a client that says whether a connection lived.
//!
//! The server has one thread for each connection and sends back what it gets. The client sends a
//! numbered line every 50 ms over one connection, waits for it to come back, and measures how long
//! that took: the longest round trip is the longest pause of guest and network together.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Connections at once; more are closed at once.
pub const MOST_CONNECTIONS: u32 = 64;
/// The time between two lines.
pub const INTERVAL: Duration = Duration::from_millis(50);
/// An answer that takes longer counts as a lost connection.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Serves until the listener fails.
///
/// # Errors
/// The listener's failure.
pub fn serve(listener: &TcpListener) -> io::Result<()> {
    let open = Arc::new(AtomicU32::new(0));
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            // The peer was gone before we got to it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        if open.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        println!("echo: connection from {peer}");
        let mine = Arc::clone(&open);
        let spawned = thread::Builder::new()
            .name(format!("echo-{peer}"))
            .spawn(move || {
                let end = match answer(stream) {
                    Ok(bytes) => format!("closed after {bytes} bytes"),
                    Err(error) => format!("lost: {error}"),
                };
                println!("echo: connection from {peer} {end}");
                mine.fetch_sub(1, Ordering::Relaxed);
            });
        if spawned.is_err() {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn answer(mut stream: TcpStream) -> io::Result<u64> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 16 << 10];
    let mut total = 0;
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        stream.write_all(buffer.get(..count).unwrap_or_default())?;
        total += count as u64;
    }
}

/// What a client saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Lines that came back.
    pub lines: u64,
    /// The longest round trip.
    pub worst: Duration,
    /// How the connection was lost, if it was.
    pub lost: Option<String>,
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let worst = self.worst.as_secs_f64() * 1000.0;
        match &self.lost {
            None => write!(f, "echo: ok n={} worst_ms={worst:.1}", self.lines),
            Some(lost) => write!(
                f,
                "echo: BAD n={} worst_ms={worst:.1} disconnect: {lost}",
                self.lines
            ),
        }
    }
}

/// Sends lines over one connection until `ends` says so.
pub fn client(stream: TcpStream, mut ends: impl FnMut() -> bool) -> Seen {
    let mut seen = Seen::default();
    if let Err(error) = exchange(stream, &mut ends, &mut seen) {
        seen.lost = Some(error.to_string());
    }
    seen
}

fn exchange(
    mut stream: TcpStream,
    ends: &mut impl FnMut() -> bool,
    seen: &mut Seen,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    let mut printed = Instant::now();
    while !ends() {
        let started = Instant::now();
        let sent = format!("line {} of a connection that must live\n", seen.lines);
        stream.write_all(sent.as_bytes())?;
        line.clear();
        // Bounded: a line that never ends would come from something that is no echo server.
        let mut one = (&mut answers).take(sent.len() as u64);
        if one.read_line(&mut line)? == 0 {
            return Err(io::Error::other("the other side closed it"));
        }
        if line != sent {
            return Err(io::Error::other(format!(
                "line {} came back as {line:?}",
                seen.lines
            )));
        }
        seen.lines += 1;
        seen.worst = seen.worst.max(started.elapsed());
        if printed.elapsed() >= Duration::from_secs(5) {
            printed = Instant::now();
            let worst = seen.worst.as_secs_f64() * 1000.0;
            println!("echo: n={} worst_ms={worst:.1}", seen.lines);
        }
        thread::sleep(INTERVAL.saturating_sub(started.elapsed()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || serve(&listener));
        address
    }

    #[test]
    fn several_connections_are_echoed() {
        let address = server();
        let clients: Vec<_> = (0..3)
            .map(|_| {
                let stream = TcpStream::connect(address).unwrap();
                let mut left = 4;
                thread::spawn(move || {
                    client(stream, || {
                        left -= 1;
                        left < 0
                    })
                })
            })
            .collect();
        for client in clients {
            let seen = client.join().unwrap();
            assert_eq!((seen.lines, &seen.lost), (4, &None));
            assert!(seen.to_string().starts_with("echo: ok n=4 worst_ms="));
        }
    }

    #[test]
    fn a_lost_connection_and_a_wrong_answer_are_said() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let served = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            drop(stream);
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&[b'x'; 200]).unwrap();
            stream
        });
        let seen = client(TcpStream::connect(address).unwrap(), || false);
        assert!(seen.lost.is_some());
        assert!(seen.to_string().starts_with("echo: BAD n=0"), "{seen}");
        let seen = client(TcpStream::connect(address).unwrap(), || false);
        assert!(seen.lost.unwrap().contains("came back as"));
        drop(served.join());
    }
}
