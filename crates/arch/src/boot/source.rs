//! Boot files as readers: an error of the host's file is kept, whatever the reader in between
//! makes of it.

use std::io::{self, Read, Seek, SeekFrom};

use strake_observe::{Because, Observation, OsContext, Result};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

use crate::observations::BootReadFailed;

/// What a kernel or an initial RAM disk is read from.
pub trait BootFile: Read + Seek {}

impl<T: Read + Seek> BootFile for T {}

/// Copies between a reader and guest memory go through a buffer of this size.
const BUFFER: usize = 256 << 10;

/// A boot file that remembers its first failure.
pub(super) struct Source<'a> {
    file: &'a mut dyn BootFile,
    what: &'static str,
    failure: Option<Observation>,
    buffer: Vec<u8>,
}

impl<'a> Source<'a> {
    pub(super) fn new(file: &'a mut dyn BootFile, what: &'static str) -> Self {
        Self {
            file,
            what,
            failure: None,
            buffer: Vec::new(),
        }
    }

    /// Its length.
    pub(super) fn size(&mut self) -> Result<u64> {
        let what = self.what;
        self.seek(SeekFrom::End(0))
            .os("seek", what)
            .because_of(|| self.unreadable())
    }

    /// Up to `most` bytes from a position on; fewer where the file ends.
    pub(super) fn head(&mut self, at: SeekFrom, most: usize) -> Result<Vec<u8>> {
        let what = self.what;
        let mut bytes = Vec::new();
        let mut read = |source: &mut Self| {
            source.seek(at)?;
            source.take(most as u64).read_to_end(&mut bytes)
        };
        read(self)
            .os("read", what)
            .because_of(|| self.unreadable())?;
        Ok(bytes)
    }

    /// The failure of the file itself, if there was one: it explains what a reader above it said.
    pub(super) fn failure(&mut self) -> Option<Observation> {
        self.failure
            .take()
            .map(|cause| Observation::from(self.unreadable()).because(cause))
    }

    pub(super) fn unreadable(&self) -> BootReadFailed {
        BootReadFailed {
            what: self.what.to_owned(),
        }
    }

    fn keep<T>(&mut self, call: &str, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && error.kind() != io::ErrorKind::Interrupted
            && self.failure.is_none()
        {
            self.failure = Some(strake_observe::OsCallFailed::new(call, self.what, error).into());
        }
        result
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = self.file.read(buffer);
        self.keep("read", result)
    }
}

impl Seek for Source<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let result = self.file.seek(to);
        self.keep("seek", result)
    }
}

impl ReadVolatile for Source<'_> {
    /// Fills all of `into` unless the file ends: guest memory's "exact" reads ask only once.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        into: &mut VolatileSlice<'_, B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(BUFFER, 0);
        let mut done = 0;
        let result = loop {
            let part = buffer
                .get_mut(..BUFFER.min(into.len() - done))
                .unwrap_or_default();
            if part.is_empty() {
                break Ok(done);
            }
            match self.read(part) {
                Ok(0) => break Ok(done),
                Ok(count) => {
                    let count = count.min(part.len());
                    into.offset(done)?
                        .copy_from(part.get(..count).unwrap_or_default());
                    done += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(VolatileMemoryError::IOError(error)),
            }
        };
        self.buffer = buffer;
        result
    }
}
