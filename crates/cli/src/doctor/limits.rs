//! Limits of this process and of the host.

use rustix::process::{Resource, getrlimit};

use super::observations::{LittleMemory, LowLimit};
use super::{Check, Need, host};
use crate::units;

/// Descriptors: one VM takes up to a hundred (queues, vectors, doorbells, images).
const FILES: u64 = 4096;
/// Locked memory: rings and pinned buffers of io_uring.
const LOCKED: u64 = 8 << 20;
/// Memory below which no useful guest fits.
const MEMORY: u64 = 512 << 20;

pub(super) fn checks() -> Vec<Check> {
    vec![
        limit("open files", Resource::Nofile, FILES, "-n", 1),
        // `ulimit -l` counts KiB.
        limit("locked memory", Resource::Memlock, LOCKED, "-l", 1024),
        memory(),
    ]
}

fn limit(name: &str, resource: Resource, wanted: u64, option: &str, unit: u64) -> Check {
    // The daemon raises the soft limit by itself: the hard one counts.
    match getrlimit(resource).maximum {
        Some(found) if found < wanted => {
            let problem = LowLimit {
                limit: name.to_owned(),
                found: found / unit,
                wanted: wanted / unit,
                option: option.to_owned(),
            };
            Check::cannot(name, Need::Useful, problem)
        }
        Some(found) => Check::ok(name, format!("up to {found}")),
        None => Check::ok(name, "unlimited"),
    }
}

fn memory() -> Check {
    const NAME: &str = "memory";
    let meminfo = match host::read("/proc/meminfo") {
        Ok(meminfo) => meminfo,
        Err(problem) => return Check::cannot(NAME, Need::Useful, problem),
    };
    let available = available(&meminfo).unwrap_or(0);
    if available < MEMORY {
        let problem = LittleMemory {
            available_bytes: available,
            available: units::bytes(available),
        };
        Check::cannot(NAME, Need::Useful, problem)
    } else {
        Check::ok(NAME, format!("{} available", units::bytes(available)))
    }
}

/// Bytes available, of the text of `/proc/meminfo`.
pub(super) fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}
