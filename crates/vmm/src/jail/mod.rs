//! The jail: what remains reachable to a guest that has taken over the monitor.
//!
//! In this order, because each step needs what a later one takes away:
//!
//! 1. bounds: descriptors that were not meant for the monitor are closed, limits are set;
//! 2. namespaces of its own for mounts, network, IPC and host name, and an empty, read-only root;
//! 3. an unprivileged user, no capability, no way to gain one;
//! 4. landlock: no file, no TCP port, no abstract socket, no signal to another process;
//! 5. system calls: a list for each kind of thread. Whoever calls another one ends the process.
//!
//! Started without root, step 2 needs user namespaces; where those are forbidden the monitor runs
//! without it, and says so.

mod landlock;
mod limits;
mod namespaces;
mod privileges;
mod seccomp;

use strake_observe::{Because, Observation, OsContext, Result};

use crate::arguments::Arguments;
use crate::observations::JailFailed;

/// Locks the process in. To be called while it has one thread and has opened nothing. What the host
/// cannot give is returned.
pub(crate) fn enter(arguments: &Arguments) -> Result<Vec<Observation>> {
    let mut reduced = Vec::new();
    limits::set(arguments.listen_fd).because_of(|| step("limiting resources"))?;
    let root = rustix::process::geteuid().is_root();
    if root {
        namespaces::enter().because_of(|| step("leaving the host's namespaces"))?;
        privileges::become_user(arguments.uid, arguments.gid)
            .because_of(|| step("becoming an unprivileged user"))?;
    } else if let Err(seen) = namespaces::enter_as_user() {
        reduced.push(seen);
    }
    privileges::renounce().because_of(|| step("giving up privileges"))?;
    reduced.extend(landlock::restrict());
    rustix::thread::set_name(c"strake-vmm")
        .os("prctl", "PR_SET_NAME")
        .because_of(|| step("naming the process"))?;
    seccomp::install().because_of(|| step("restricting system calls"))?;
    Ok(reduced)
}

fn step(step: &str) -> JailFailed {
    JailFailed {
        step: step.to_owned(),
    }
}
