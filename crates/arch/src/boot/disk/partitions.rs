//! Partition tables: GPT, MBR with logical partitions, or none.

use strake_observe::Result;

use super::reader::Disk;

/// GPT entries that are looked at; the usual table has 128.
const MOST_ENTRIES: u32 = 256;
/// Logical partitions that are looked at: the chain may be circular.
const MOST_LOGICAL: u32 = 60;

/// A partition, or the whole disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Partition {
    /// Its number, as Linux counts; `None` for the whole disk.
    pub(super) number: Option<u32>,
    /// Its first byte.
    pub(super) start: u64,
    /// Its size in bytes.
    pub(super) size: u64,
    /// What `root=PARTUUID=` takes.
    pub(super) uuid: Option<String>,
}

impl Partition {
    pub(super) fn name(&self) -> String {
        match self.number {
            Some(number) => format!("partition {number}"),
            None => "the whole disk".to_owned(),
        }
    }
}

/// Lists the partitions in the order of the table.
pub(super) fn read(disk: &Disk) -> Result<Vec<Partition>> {
    for sector in [512_u64, 4096] {
        let header = disk.up_to(sector, 512)?;
        if header.starts_with(b"EFI PART") {
            return gpt(disk, &header, sector);
        }
    }
    let whole = Partition {
        number: None,
        start: 0,
        size: disk.size(),
        uuid: None,
    };
    let head = disk.up_to(0, 2048)?;
    // A file system on the whole disk may have a boot sector that looks like a partition table.
    if head.get(1080..1082) == Some(b"\x53\xef") || head.get(510..512) != Some(b"\x55\xaa") {
        return Ok(vec![whole]);
    }
    let parts = mbr(disk, &head)?;
    Ok(if parts.is_empty() { vec![whole] } else { parts })
}

/// A range of sectors as bytes, if it is not empty and begins on the disk.
fn bytes(disk: &Disk, first: u64, count: u64, sector: u64) -> Option<(u64, u64)> {
    let start = first.checked_mul(sector)?;
    let size = count.checked_mul(sector)?;
    let left = disk.size().checked_sub(start)?;
    let size = size.min(left);
    (size > 0 && first > 0).then_some((start, size))
}

fn gpt(disk: &Disk, header: &[u8], sector: u64) -> Result<Vec<Partition>> {
    const UNUSED: [u8; 16] = [0; 16];
    let table = u64_at(header, 72).saturating_mul(sector);
    let count = u32_at(header, 80).min(MOST_ENTRIES);
    let width = u32_at(header, 84).clamp(128, 4096);
    let length = usize::try_from(count * width).unwrap_or(0);
    let entries = disk.up_to(table, length)?;
    let mut parts = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(usize::try_from(width).unwrap_or(128))) {
        if entry.starts_with(&UNUSED) {
            continue;
        }
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let count = last.wrapping_sub(first).wrapping_add(1);
        let Some((start, size)) = bytes(disk, first, count, sector).filter(|_| last >= first)
        else {
            continue;
        };
        parts.push(Partition {
            number: Some(number),
            start,
            size,
            uuid: entry.get(16..32).map(guid),
        });
    }
    Ok(parts)
}

/// GPT's mixed order: the first three fields are little-endian.
fn guid(raw: &[u8]) -> String {
    const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::new();
    for (index, from) in ORDER.into_iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{:02x}", raw.get(from).copied().unwrap_or(0)));
    }
    text
}

fn mbr(disk: &Disk, head: &[u8]) -> Result<Vec<Partition>> {
    const SECTOR: u64 = 512;
    let signature = u32_at(head, 440);
    let mut parts = Vec::new();
    let mut extended = None;
    let mut add = |number: u32, first: u64, count: u64| {
        if let Some((start, size)) = bytes(disk, first, count, SECTOR) {
            parts.push(Partition {
                number: Some(number),
                start,
                size,
                uuid: Some(format!("{signature:08x}-{number:02x}")),
            });
        }
    };
    for (number, entry) in (1..=4).zip(Entry::table(head)) {
        match entry.kind {
            0 => {}
            5 | 0xf | 0x85 => extended = extended.or(Some(entry.first)),
            _ => add(number, entry.first, entry.count),
        }
    }
    // Each logical partition has a table of its own: itself, relative to the table, and the next
    // table, relative to the extended partition.
    let Some(base) = extended else {
        return Ok(parts);
    };
    let mut at = base;
    for number in 5..5 + MOST_LOGICAL {
        let table = disk.up_to(at.saturating_mul(SECTOR), 512)?;
        if table.get(510..512) != Some(b"\x55\xaa") {
            break;
        }
        let mut entries = Entry::table(&table);
        if let Some(entry) = entries.next().filter(|entry| entry.kind != 0) {
            add(number, at + entry.first, entry.count);
        }
        match entries.next() {
            Some(next) if next.kind != 0 && next.first != 0 => at = base + next.first,
            _ => break,
        }
    }
    Ok(parts)
}

struct Entry {
    kind: u8,
    first: u64,
    count: u64,
}

impl Entry {
    fn table(sector: &[u8]) -> impl Iterator<Item = Self> {
        sector
            .get(446..510)
            .unwrap_or_default()
            .chunks_exact(16)
            .map(|entry| Self {
                kind: entry.get(4).copied().unwrap_or(0),
                first: u64::from(u32_at(entry, 8)),
                count: u64::from(u32_at(entry, 12)),
            })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|from| from.first_chunk())
        .map_or(0, |raw| u32::from_le_bytes(*raw))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|from| from.first_chunk())
        .map_or(0, |raw| u64::from_le_bytes(*raw))
}
