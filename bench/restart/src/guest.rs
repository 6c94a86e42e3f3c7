//! The heartbeat guest: it reads the time-stamp counter for ever and keeps the longest time between
//! two readings in its memory, where this process looks at it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use strake_observe::{OsContext, Result};

#[path = "../../../crates/machine/src/control/tests/guests.rs"]
#[allow(
    dead_code,
    reason = "of the test guests only the form of their files is used"
)]
mod guests;

/// Where it keeps: the last reading (8 bytes), the longest gap (4 bytes), in ticks.
const PLACE: u64 = 0x20_0000;
const LONGEST: u64 = PLACE + 8;

/// How long the counter's rate is looked at.
const RATE_WINDOW: Duration = Duration::from_millis(300);

/// An ELF file with a PVH entry: 32-bit protected mode, no paging.
pub(crate) fn kernel() -> Vec<u8> {
    let code = vec![
        0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, PLACE
        0x0f, 0x31, // rdtsc
        0x89, 0x07, // mov [edi], eax
        0x89, 0x57, 0x04, // mov [edi+4], edx
        // again:
        0x0f, 0x31, // rdtsc
        0x89, 0xc6, // mov esi, eax
        0x89, 0xd5, // mov ebp, edx
        0x2b, 0x07, // sub eax, [edi]
        0x1b, 0x57, 0x04, // sbb edx, [edi+4]
        0x89, 0x37, // mov [edi], esi
        0x89, 0x6f, 0x04, // mov [edi+4], ebp
        0x3b, 0x47, 0x08, // cmp eax, [edi+8]
        0x76, 0xeb, // jbe again
        0x89, 0x47, 0x08, // mov [edi+8], eax
        0xeb, 0xe6, // jmp again
    ];
    guests::elf(&[code])
}

/// A running guest's memory.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    memory: File,
    ticks_per_ms: f64,
}

impl Heartbeat {
    /// The guest of the monitor `pid`.
    pub(crate) fn find(pid: u32) -> Result<Self> {
        let directory = format!("/proc/{pid}/fd");
        let entries = std::fs::read_dir(&directory).os("opendir", &directory)?;
        let mut memory = None;
        for entry in entries.flatten() {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            if target.to_string_lossy().contains("memfd:strake-ram") {
                let opened = File::options().read(true).write(true).open(entry.path());
                memory = Some(opened.os("open", entry.path().display())?);
            }
        }
        let memory = memory.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotFound));
        let memory = memory.os("find", format!("the guest's memory in {directory}"))?;
        let mut this = Self {
            memory,
            ticks_per_ms: 1.0,
        };
        std::thread::sleep(RATE_WINDOW);
        let (start, first) = (Instant::now(), this.number(PLACE)?);
        std::thread::sleep(RATE_WINDOW);
        let (passed, second) = (start.elapsed(), this.number(PLACE)?);
        #[allow(clippy::cast_precision_loss)] // of a rate
        let ticks = second.wrapping_sub(first) as f64;
        this.ticks_per_ms = ticks / (passed.as_secs_f64() * 1e3);
        Ok(this)
    }

    /// Forgets the longest gap so far.
    pub(crate) fn forget(&self) -> Result<()> {
        self.memory
            .write_all_at(&[0; 4], LONGEST)
            .os("write", "the guest's memory")
    }

    /// The longest gap since then, in milliseconds.
    pub(crate) fn longest_gap(&self) -> Result<f64> {
        let ticks = self.number(LONGEST)? & u64::from(u32::MAX);
        #[allow(clippy::cast_precision_loss)] // it has 32 bits
        Ok(ticks as f64 / self.ticks_per_ms)
    }

    fn number(&self, at: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.memory
            .read_exact_at(&mut bytes, at)
            .os("read", "the guest's memory")?;
        Ok(u64::from_le_bytes(bytes))
    }
}
