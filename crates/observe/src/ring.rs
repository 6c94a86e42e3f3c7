//! The last observations of a process in a file that outlives it.
//!
//! A process that is killed cannot tell what it saw last: what lay in its memory, and what it had
//! queued for its parent, is gone. So its recorder also writes each open observation into a file that the
//! parent made (on a file system in memory), with one `pwrite` into the next of [`SLOTS`] slots, and the parent reads
//! it when the process is gone. SIGKILL does not undo a write; a slot that was cut in its middle has a
//! wrong checksum and is skipped.
//!
//! ```text
//!   slot: magic u32, length u32, sequence u64, checksum u64, then that many bytes of JSON
//! ```
//!
//! The writer is not trusted by the reader: a monitor may have been taken over by its guest. The
//! reader takes no address, count or length from it unchecked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Observation;

/// How many observations the file holds.
pub(crate) const SLOTS: u64 = 64;

/// The size of a slot in bytes. An observation that is larger loses causes from below.
const SLOT: usize = 8192;

const HEADER: usize = 24;
const MAGIC: u32 = 0x5342_4f31;

/// Levels of causes that are tried in turn until an observation fits into its slot.
const LEVELS: &[usize] = &[32, 4, 2, 1, 0];

/// The writer's end.
#[derive(Debug)]
pub struct Ring {
    file: File,
    next: AtomicU64,
}

impl Ring {
    /// Writes into `file`, which is empty and open for writing.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self {
            file,
            next: AtomicU64::new(0),
        }
    }

    /// Keeps an observation. What cannot be written is lost: there is nobody to tell.
    pub fn keep(&self, seen: &Observation) {
        let Some(payload) = fitting(seen) else {
            return;
        };
        let sequence = self.next.fetch_add(1, Ordering::Relaxed);
        let mut slot = Vec::with_capacity(HEADER + payload.len());
        slot.extend_from_slice(&MAGIC.to_le_bytes());
        // Fits: a slot is far smaller.
        slot.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(0).to_le_bytes());
        slot.extend_from_slice(&sequence.to_le_bytes());
        slot.extend_from_slice(&checksum(sequence, &payload).to_le_bytes());
        slot.extend_from_slice(&payload);
        let at = (sequence % SLOTS) * SLOT as u64;
        let _ = self.file.write_all_at(&slot, at);
    }
}

/// As JSON that fits into a slot, with as many causes as do.
fn fitting(seen: &Observation) -> Option<Vec<u8>> {
    let fits = |json: &Vec<u8>| json.len() <= SLOT - HEADER;
    LEVELS
        .iter()
        .filter_map(|levels| serde_json::to_vec(&seen.clone().cut_below(*levels)).ok())
        .find(fits)
        .or_else(|| {
            let mut record = seen.clone().cut_below(0).into_record();
            record.data.clear();
            serde_json::to_vec(&Observation::from_record(record))
                .ok()
                .filter(fits)
        })
}

/// What a process that is gone left in its file, oldest first.
///
/// # Errors
/// When the file cannot be read. What is damaged in it is skipped.
pub fn left_behind(file: &File) -> io::Result<Vec<Observation>> {
    let mut found = Vec::new();
    let mut slot = vec![0; SLOT];
    for number in 0..SLOTS {
        let at = number * SLOT as u64;
        let length = read_up_to(file, &mut slot, at)?;
        if length == 0 {
            break;
        }
        if let Some((sequence, seen)) = slot.get(..length).and_then(parse)
            && sequence % SLOTS == number
        {
            found.push((sequence, seen));
        }
    }
    found.sort_by_key(|(sequence, _)| *sequence);
    Ok(found.into_iter().map(|(_, seen)| seen).collect())
}

fn read_up_to(file: &File, slot: &mut [u8], at: u64) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = slot.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn parse(slot: &[u8]) -> Option<(u64, Observation)> {
    let (magic, rest) = slot.split_first_chunk::<4>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (sequence, rest) = rest.split_first_chunk::<8>()?;
    let (sum, rest) = rest.split_first_chunk::<8>()?;
    if u32::from_le_bytes(*magic) != MAGIC {
        return None;
    }
    let payload = rest.get(..usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    let sequence = u64::from_le_bytes(*sequence);
    if checksum(sequence, payload) != u64::from_le_bytes(*sum) {
        return None;
    }
    // The JSON reader follows 128 levels at most, and 8 KiB hold few.
    let seen: Observation = serde_json::from_slice(payload).ok()?;
    Some((sequence, seen))
}

/// FNV-1a: finds what was cut, not what was forged; a forger writes what it likes anyway.
fn checksum(sequence: u64, payload: &[u8]) -> u64 {
    let bytes = sequence.to_le_bytes();
    bytes
        .iter()
        .chain(payload)
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OsCallFailed;

    fn seen(number: u64) -> Observation {
        OsCallFailed {
            call: "pwrite".into(),
            object: format!("file {number}"),
            errno: Some(5),
            name: "EIO".into(),
            reason: "Input/output error".into(),
            advice: "look at the disk".into(),
        }
        .into()
    }

    fn texts(file: &File) -> Vec<String> {
        let left = left_behind(file).unwrap();
        left.iter().map(|seen| seen.text().to_owned()).collect()
    }

    #[test]
    fn the_last_ones_are_found_in_their_order() {
        let file = tempfile::tempfile().unwrap();
        let ring = Ring::new(file.try_clone().unwrap());
        assert!(texts(&file).is_empty());
        let total = SLOTS * 2 + 7;
        for number in 0..total {
            ring.keep(&seen(number));
        }
        let want: Vec<String> = (total - SLOTS..total)
            .map(|number| seen(number).text().to_owned())
            .collect();
        assert_eq!(texts(&file), want);
    }

    #[test]
    fn what_was_cut_or_overwritten_is_skipped_and_nothing_else() {
        let file = tempfile::tempfile().unwrap();
        let ring = Ring::new(file.try_clone().unwrap());
        for number in 0..5 {
            ring.keep(&seen(number));
        }
        file.write_all_at(b"xx", 2 * SLOT as u64 + 100).unwrap();
        file.write_all_at(&u32::MAX.to_le_bytes(), 3 * SLOT as u64 + 4)
            .unwrap();
        let want = [0, 1, 4].map(|number| seen(number).text().to_owned());
        assert_eq!(texts(&file), want);
        file.set_len(SLOT as u64 + 40).unwrap();
        assert_eq!(texts(&file), [seen(0).text().to_owned()]);
    }

    #[test]
    fn a_large_tree_keeps_its_top() {
        let file = tempfile::tempfile().unwrap();
        let ring = Ring::new(file.try_clone().unwrap());
        let wide = seen(0).because_all((1..200).map(seen));
        let deep = (1..30).fold(seen(0), |below, number| seen(number).because(below));
        ring.keep(&wide);
        ring.keep(&deep);
        let left = left_behind(&file).unwrap();
        assert_eq!(left.len(), 2);
        assert_eq!(left[0].text(), wide.text());
        assert!(left[0].causes().is_empty());
        assert_eq!(left[1].text(), deep.text());
        assert!(!left[1].causes().is_empty());
    }

    proptest::proptest! {
        #[test]
        fn no_file_makes_the_reader_fail(bytes: Vec<u8>, at in 0..SLOT as u64 * 3) {
            let file = tempfile::tempfile().unwrap();
            Ring::new(file.try_clone().unwrap()).keep(&seen(1));
            file.write_all_at(&bytes, at).unwrap();
            left_behind(&file).unwrap();
        }
    }
}
