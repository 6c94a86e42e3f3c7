//! A shell in a guest, over its network: port 1000 answers, see the guests' first processes in
//! `xtask`.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Outcome, While};

const SHELL_PORT: u16 = 1000;
const END: &str = "strake-test-end";

/// A guest's network address.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    /// Where it answers.
    pub address: Ipv4Addr,
}

impl Guest {
    /// Runs a shell command in the guest and returns what it printed.
    ///
    /// # Errors
    /// If the guest does not answer within the limit or the command fails.
    pub fn sh(&self, command: &str, limit: Duration) -> Outcome<String> {
        let (status, out) = self
            .ask(command, limit)
            .doing(format!("`{command}` in the guest"))?;
        if status == 0 {
            return Ok(out);
        }
        Err(Failure::new(format!(
            "`{command}` in the guest ended with {status}:\n{out}"
        )))
    }

    /// Starts a command in the guest that goes on by itself; its output goes to the file.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn start(&self, command: &str, output: &str) -> Outcome {
        let words = format!("{command} </dev/null >{output} 2>&1 &");
        self.sh(&words, Duration::from_secs(20)).map(drop)
    }

    /// Runs a shell command in the guest and returns its status and what it printed.
    ///
    /// # Errors
    /// If the guest does not answer within the limit.
    pub fn ask(&self, command: &str, limit: Duration) -> Outcome<(i32, String)> {
        let started = Instant::now();
        let left = || {
            limit
                .saturating_sub(started.elapsed())
                .max(Duration::from_millis(1))
        };
        let mut stream = connect(SocketAddr::from((self.address, SHELL_PORT)), limit)?;
        stream.set_read_timeout(Some(left()))?;
        let line = format!("{{ {command}\n}} 2>&1; status=$?; echo; echo {END} $status; exit\n");
        stream.write_all(line.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut said = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => said.extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(error) => {
                    let said = String::from_utf8_lossy(&said).into_owned();
                    return Err(Failure::new(format!("{error} after {said:?}")));
                }
            }
            stream.set_read_timeout(Some(left()))?;
        }
        let said = String::from_utf8_lossy(&said).into_owned();
        let (out, status) = said
            .rsplit_once(END)
            .ok_or_else(|| Failure::new(format!("the guest hung up after {said:?}")))?;
        let status = status
            .trim()
            .parse()
            .map_err(|_| Failure::new(format!("no status in {said:?}")))?;
        Ok((status, out.trim_end().to_owned()))
    }
}

/// Connects, trying again until the limit: the guest may still be starting.
///
/// # Errors
/// The last reason.
pub fn connect(address: SocketAddr, limit: Duration) -> Outcome<TcpStream> {
    let started = Instant::now();
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) if started.elapsed() > limit => {
                return Err(Failure::new(format!("connecting to {address}: {error}")));
            }
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}
