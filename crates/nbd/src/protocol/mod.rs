//! The bytes of the NBD protocol: pure functions between bytes and values, for both sides.
//!
//! Nothing here reads or waits. Whatever comes in may be hostile: every parser takes all that it
//! is given, checks every length against what is there, and returns an observation instead of
//! guessing. The names are those of the protocol's specification (`doc/proto.md` of the NBD
//! project, in the public domain), without their prefixes.

pub mod handshake;
pub mod transmission;

#[cfg(test)]
mod tests;

use strake_observe::{Observation, Result};

use crate::Malformed;

/// The largest payload of a request or reply that we send or take (2^25, which the specification
/// asks everybody to take).
pub const MAX_PAYLOAD: u32 = 32 * 1024 * 1024;

/// The longest string of the protocol.
pub const MAX_STRING: usize = 4096;

/// What a message is made of: takes big-endian numbers off the front.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    what: &'static str,
    bytes: &'a [u8],
}

pub(crate) fn malformed(what: &str, why: impl Into<String>) -> Observation {
    Malformed {
        what: what.to_owned(),
        why: why.into(),
    }
    .into()
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes }
    }

    pub(crate) fn bad(&self, why: impl Into<String>) -> Observation {
        malformed(self.what, why)
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        match self.bytes.split_at_checked(count) {
            Some((taken, rest)) => {
                self.bytes = rest;
                Ok(taken)
            }
            None => Err(self.bad(format!(
                "{count} bytes expected, {} are left",
                self.bytes.len()
            ))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| self.bad("too short"))
    }

    pub(crate) fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string of `count` bytes.
    pub(crate) fn string(&mut self, count: usize) -> Result<String> {
        if count > MAX_STRING {
            return Err(self.bad(format!("a string of {count} bytes")));
        }
        let taken = self.take(count)?;
        let text =
            std::str::from_utf8(taken).map_err(|_| self.bad("a string that is not UTF-8"))?;
        if text.contains('\0') {
            return Err(self.bad("a string with a zero byte"));
        }
        Ok(text.to_owned())
    }

    /// A string with its length in 32 bits before it.
    pub(crate) fn counted_string(&mut self) -> Result<String> {
        let count = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        self.string(count)
    }

    pub(crate) fn left(&self) -> usize {
        self.bytes.len()
    }

    /// Text for people, whatever it is: cut and made printable.
    pub(crate) fn words(&mut self, count: usize) -> Result<String> {
        let taken = self.take(count)?;
        let shown = taken.get(..taken.len().min(MAX_STRING)).unwrap_or(taken);
        Ok(String::from_utf8_lossy(shown)
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect())
    }

    pub(crate) fn end(self) -> Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        Err(self.bad(format!("{} bytes too many", self.bytes.len())))
    }
}

/// The length of a message as the protocol writes it. What we write is bounded far below.
pub(crate) fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// A text cut to what a string of the protocol may have, at a character's end.
pub(crate) fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or("")
}
