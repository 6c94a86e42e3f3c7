//! The journal of a migration: a small file beside the destination.
//!
//! It tells a daemon that finds a destination after a crash which job left it there. It is *not*
//! the authority: that is the inventory's binding of the disk (see the [module above](super)).
//!
//! Two slots are written in turn, each with a growing sequence number and a checksum, so that a
//! torn write leaves the record before it:
//!
//! ```text
//!   slot 0 at byte 0, slot 1 at byte 16384; each
//!      0  8  "STRAKEJ\n"
//!      8  4  version (1), little endian like all that follow
//!     12  4  length of the payload
//!     16  8  sequence number
//!     24  4  CRC-32C of bytes 0..24 and the payload
//!     28  4  zero
//!     32  …  payload: the record as JSON
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use strake_api::job::{JobId, Phase};
use strake_observe::{Because, OsContext, Result};

use crate::{JournalDamaged, JournalUnwritable, JournalVersion};

/// The version that is written. A reader refuses another one by number.
pub const VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"STRAKEJ\n";
const HEADER: usize = 32;
const SLOT_BYTES: usize = 16 * 1024;

/// What the journal says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The job.
    pub job: JobId,
    /// The disk's name in its VM's spec.
    pub disk: String,
    /// The path of the source.
    pub source: String,
    /// The path of the destination.
    pub destination: String,
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// The last phase that the job is known to have reached. From [`Phase::Suspended`] on the
    /// daemon may have been asked to commit: its inventory knows the answer.
    pub phase: Phase,
}

/// Whether a record must have reached the device before the call returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durable {
    Now,
    Later,
}

/// The writing side.
#[derive(Debug)]
pub(crate) struct Journal {
    /// None for a job that leaves nothing behind that would need an explanation.
    file: Option<File>,
    record: Record,
    sequence: u64,
}

impl Journal {
    /// A journal for a file that is empty or another run's, and not touched yet.
    pub(crate) fn new(file: impl Into<Option<File>>, record: Record) -> Self {
        Self {
            file: file.into(),
            record,
            sequence: 0,
        }
    }

    /// Writes what it begins with. Waits for the destination's store, as all that follows.
    pub(crate) fn begin(&mut self) -> Result<()> {
        self.sequence = self
            .file
            .as_ref()
            .and_then(|file| newest(file).ok())
            .map_or(0, |(sequence, _)| sequence);
        // Both slots exist from the start, so that no later write has to find space.
        self.write(Durable::Later)?;
        self.write(Durable::Now)
    }

    /// The job has reached `phase`.
    pub(crate) fn reach(&mut self, phase: Phase, durable: Durable) -> Result<()> {
        self.record.phase = phase;
        self.write(durable)
    }

    fn write(&mut self, durable: Durable) -> Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        self.sequence += 1;
        let because = |path: &str| JournalUnwritable {
            destination: path.to_owned(),
        };
        let slot = encode(&self.record, self.sequence)
            .ok_or_else(|| damaged("the names do not fit into a record"))
            .because_of(|| because(&self.record.destination))?;
        let at = (self.sequence % 2) * SLOT_BYTES as u64;
        file.write_all_at(&slot, at)
            .os("pwrite", format!("the journal of {}", self.record.job))
            .because_of(|| because(&self.record.destination))?;
        if durable == Durable::Now {
            file.sync_data()
                .os("fdatasync", format!("the journal of {}", self.record.job))
                .because_of(|| because(&self.record.destination))?;
        }
        Ok(())
    }
}

/// Reads a journal.
///
/// # Errors
/// When it cannot be read or holds no whole record.
pub fn read(file: &mut File) -> Result<Record> {
    newest(file).map(|(_, record)| record)
}

fn newest(file: &File) -> Result<(u64, Record)> {
    let (sequence, payload) = read_newest(file, MAGIC, SLOT_BYTES)?;
    Ok((sequence, parse(&payload)?))
}

fn parse(payload: &[u8]) -> Result<Record> {
    serde_json::from_slice(payload)
        .map_err(|error| damaged(&format!("its record is not understood: {error}")))
}

/// The newest whole payload of two slots that are written in turn, and its sequence number.
pub(super) fn read_newest(
    file: &File,
    magic: &[u8; 8],
    slot_bytes: usize,
) -> Result<(u64, Vec<u8>)> {
    let mut newest: Option<(u64, Vec<u8>)> = None;
    let mut first_damage = None;
    for slot in 0..2u64 {
        let mut bytes = vec![0u8; slot_bytes];
        let got = read_fully(file, &mut bytes, slot * slot_bytes as u64)
            .os("pread", "a migration's journal")?;
        bytes.truncate(got);
        match unframe(magic, &bytes) {
            Ok((sequence, payload)) => {
                if newest.as_ref().is_none_or(|(than, _)| sequence > *than) {
                    newest = Some((sequence, payload.to_vec()));
                }
            }
            Err(damage) => {
                first_damage.get_or_insert(damage);
            }
        }
    }
    match (newest, first_damage) {
        (Some(newest), _) => Ok(newest),
        (None, Some(damage)) => Err(damage),
        (None, None) => Err(damaged("it is empty")),
    }
}

fn read_fully(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn damaged(why: &str) -> strake_observe::Observation {
    JournalDamaged {
        why: why.to_owned(),
    }
    .into()
}

fn encode(record: &Record, sequence: u64) -> Option<Vec<u8>> {
    frame(
        MAGIC,
        &serde_json::to_vec(record).ok()?,
        sequence,
        SLOT_BYTES,
    )
}

/// One slot; none if the payload does not fit.
pub(super) fn frame(
    magic: &[u8; 8],
    payload: &[u8],
    sequence: u64,
    slot_bytes: usize,
) -> Option<Vec<u8>> {
    if payload.len() > slot_bytes - HEADER {
        return None;
    }
    let mut slot = Vec::with_capacity(slot_bytes);
    slot.extend_from_slice(magic);
    slot.extend_from_slice(&VERSION.to_le_bytes());
    slot.extend_from_slice(&u32::try_from(payload.len()).ok()?.to_le_bytes());
    slot.extend_from_slice(&sequence.to_le_bytes());
    let crc = crc32c(&[&slot, payload]);
    slot.extend_from_slice(&crc.to_le_bytes());
    slot.extend_from_slice(&[0; 4]);
    slot.extend_from_slice(payload);
    slot.resize(slot_bytes, 0);
    Some(slot)
}

/// Reads one slot. Whatever the bytes are, the answer is a record or what is wrong with them.
#[cfg(test)]
fn decode(slot: &[u8]) -> Result<(u64, Record)> {
    let (sequence, payload) = unframe(MAGIC, slot)?;
    Ok((sequence, parse(payload)?))
}

/// The sequence number and the payload of one slot.
fn unframe<'a>(magic: &[u8; 8], slot: &'a [u8]) -> Result<(u64, &'a [u8])> {
    let word = |at: usize| {
        let bytes = slot.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let (Some(found), Some(version), Some(len), Some(crc)) =
        (slot.get(..8), word(8), word(12), word(24))
    else {
        return Err(damaged("it is too short"));
    };
    if found != magic {
        return Err(damaged("it does not begin like one"));
    }
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let payload = HEADER
        .checked_add(len)
        .and_then(|end| slot.get(HEADER..end));
    let (Some(head), Some(payload)) = (slot.get(..24), payload) else {
        return Err(damaged("its length is impossible"));
    };
    if crc32c(&[head, payload]) != crc {
        return Err(damaged("its checksum is wrong"));
    }
    // Only after the checksum: a damaged version number is damage, not another version.
    if version != VERSION {
        return Err(JournalVersion {
            version,
            known: VERSION,
        }
        .into());
    }
    let sequence = slot
        .get(16..24)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes);
    Ok((sequence, payload))
}

fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut crc = u32::MAX;
    for byte in parts.iter().copied().flatten() {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let low = crc & 1;
            crc >>= 1;
            if low == 1 {
                crc ^= 0x82f6_3b78;
            }
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> Record {
        Record {
            job: JobId("job-7".into()),
            disk: "root".into(),
            source: "/slow/web1.raw".into(),
            destination: "/fast/web1.raw".into(),
            size_bytes: 1 << 30,
            phase: Phase::Preparing,
        }
    }

    #[test]
    fn the_checksum_is_crc_32c() {
        assert_eq!(crc32c(&[b"1234", b"56789"]), 0xe306_9283);
    }

    #[test]
    fn the_newest_whole_record_counts() {
        let mut file = tempfile::tempfile().unwrap();
        let mut journal = Journal::new(file.try_clone().unwrap(), record());
        assert!(read(&mut file).unwrap_err().is::<JournalDamaged>());
        journal.begin().unwrap();
        assert_eq!(read(&mut file).unwrap(), record());
        for phase in [Phase::Copying, Phase::Suspended, Phase::Completed] {
            journal.reach(phase, Durable::Now).unwrap();
            assert_eq!(read(&mut file).unwrap().phase, phase);
        }
        // The write of the last record was torn: the one before it counts.
        let slot = (journal.sequence % 2) * SLOT_BYTES as u64;
        file.write_all_at(&[0xff; 64], slot + 40).unwrap();
        assert_eq!(read(&mut file).unwrap().phase, Phase::Suspended);
    }

    #[test]
    fn what_is_no_journal_is_said_to_be_none() {
        let mut file = tempfile::tempfile().unwrap();
        assert!(read(&mut file).unwrap_err().is::<JournalDamaged>());
        file.write_all_at(&[7; 40_000], 0).unwrap();
        assert!(read(&mut file).unwrap_err().is::<JournalDamaged>());
        let mut other = encode(&record(), 3).unwrap();
        other[8] = 9;
        let payload = serde_json::to_vec(&record()).unwrap();
        let crc = crc32c(&[&other[..24], &payload]);
        other[24..28].copy_from_slice(&crc.to_le_bytes());
        assert!(decode(&other).unwrap_err().is::<JournalVersion>());
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        let mut long = record();
        long.source = "/x".repeat(20_000);
        let mut journal = Journal::new(tempfile::tempfile().unwrap(), long);
        let seen = journal.begin().unwrap_err();
        assert!(seen.is::<JournalUnwritable>(), "{seen}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_an_observation(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn any_damage_is_noticed(at in 0usize..200, flip in 1u8..=255) {
            let mut slot = encode(&record(), 5).unwrap();
            let used = HEADER + serde_json::to_vec(&record()).unwrap().len();
            let at = at % used;
            slot[at] ^= flip;
            // Bytes 28..32 are not used.
            prop_assert_eq!(decode(&slot).is_ok(), (28..32).contains(&at));
        }
    }
}
