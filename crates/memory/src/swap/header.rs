//! The header of a swap file: whose it is.

use std::hash::Hasher;

use strake_observe::{Observation, Result};
use twox_hash::XxHash3_64;

use crate::observations::{NotASwapFile, SwapOfAnother};

/// Bytes of the header, one block of any device.
pub(crate) const HEADER_BYTES: usize = 4096;

const MAGIC: [u8; 8] = *b"STRKSWAP";

/// The layout that this program writes and reads.
const VERSION: u32 = 1;

/// Longest name of a VM in a header.
const NAME_MAX: usize = 255;

/// Whose memory a swap file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The VM's name.
    pub name: String,
    /// The VM's identity, which no other VM ever has.
    pub uuid: [u8; 16],
}

/// What stands in the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) owner: Owner,
    /// Segments that it may grow to.
    pub(crate) segments: u32,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut block = [0; HEADER_BYTES];
        let name = self.owner.name.as_bytes();
        let name = name.get(..name.len().min(NAME_MAX)).unwrap_or_default();
        let mut body = Vec::with_capacity(HEADER_BYTES);
        body.extend_from_slice(&MAGIC);
        body.extend_from_slice(&VERSION.to_le_bytes());
        body.extend_from_slice(&self.segments.to_le_bytes());
        body.extend_from_slice(&self.owner.uuid);
        body.push(u8::try_from(name.len()).unwrap_or(0));
        body.extend_from_slice(name);
        for (to, from) in block.iter_mut().zip(body) {
            *to = from;
        }
        let sum = checksum(&block);
        for (to, from) in block.iter_mut().skip(SUM_AT).zip(sum.to_le_bytes()) {
            *to = from;
        }
        block
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`NotASwapFile`].
    pub(crate) fn decode(path: &str, block: &[u8; HEADER_BYTES]) -> Result<Self> {
        let refused = |reason: &str| -> Observation {
            NotASwapFile {
                path: path.to_owned(),
                reason: reason.to_owned(),
            }
            .into()
        };
        let mut reader = block.as_slice();
        if take::<8>(&mut reader) != Some(MAGIC) {
            return Err(refused("it does not begin as one"));
        }
        let version = take(&mut reader).map(u32::from_le_bytes);
        if version != Some(VERSION) {
            return Err(refused(&format!(
                "its layout has version {}, this program knows version {VERSION}",
                version.unwrap_or(0)
            )));
        }
        let sum = block
            .get(SUM_AT..)
            .and_then(|mut rest| take(&mut rest))
            .map(u64::from_le_bytes);
        if sum != Some(checksum(block)) {
            return Err(refused("the checksum of its header is wrong"));
        }
        let broken = || refused("its header is cut off");
        let segments = take(&mut reader)
            .map(u32::from_le_bytes)
            .ok_or_else(broken)?;
        let uuid = take(&mut reader).ok_or_else(broken)?;
        let [len] = take(&mut reader).ok_or_else(broken)?;
        let name = reader.get(..usize::from(len)).ok_or_else(broken)?;
        let name = String::from_utf8(name.to_vec())
            .map_err(|_| refused("the name of its VM is no text"))?;
        Ok(Self {
            owner: Owner { name, uuid },
            segments,
        })
    }

    /// Whether it is the file of `owner`.
    ///
    /// # Errors
    /// [`SwapOfAnother`].
    pub(crate) fn check(&self, path: &str, owner: &Owner) -> Result<()> {
        if self.owner == *owner {
            return Ok(());
        }
        Err(SwapOfAnother {
            path: path.to_owned(),
            owner: self.owner.name.clone(),
            vm: owner.name.clone(),
        }
        .into())
    }
}

/// Where the checksum stands: at the end.
const SUM_AT: usize = HEADER_BYTES - 8;

fn checksum(block: &[u8; HEADER_BYTES]) -> u64 {
    let mut hasher = XxHash3_64::new();
    hasher.write(block.get(..SUM_AT).unwrap_or_default());
    hasher.finish()
}

fn take<const N: usize>(from: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = from.split_first_chunk()?;
    *from = rest;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use strake_observe::Kind;

    use super::*;

    fn header() -> Header {
        Header {
            owner: Owner {
                name: "web1".to_owned(),
                uuid: [7; 16],
            },
            segments: 512,
        }
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(Header::decode("f", &header().encode()).unwrap(), header());
    }

    #[test]
    fn a_changed_byte_anywhere_is_seen() {
        for at in 0..HEADER_BYTES {
            let mut block = header().encode();
            block[at] ^= 1;
            let seen = Header::decode("f", &block).unwrap_err();
            assert_eq!(seen.id(), NotASwapFile::ID, "byte {at}");
        }
    }

    #[test]
    fn another_vm_of_the_same_name_is_another_vm() {
        let mut other = header().owner;
        other.uuid = [8; 16];
        let seen = header().check("f", &other).unwrap_err();
        assert_eq!(seen.id(), SwapOfAnother::ID);
        header().check("f", &header().owner).unwrap();
    }
}
