//! Numbers of a disk as indices of memory, and big-endian fields.

/// A 64-bit host: every length that is in memory fits.
pub(crate) fn us(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at.saturating_add(4)).unwrap_or_default();
    field.try_into().map_or(0, u32::from_be_bytes)
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at.saturating_add(8)).unwrap_or_default();
    field.try_into().map_or(0, u64::from_be_bytes)
}

/// Copies `from` to `to[at..]`, as far as it fits.
pub(crate) fn put(to: &mut [u8], at: usize, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(at).zip(from) {
        *to = *from;
    }
}

/// A table of big-endian numbers.
pub(crate) fn entries(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect()
}

/// The bytes of a part of a table.
pub(crate) fn bytes(entries: &[u64]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| entry.to_be_bytes())
        .collect()
}
