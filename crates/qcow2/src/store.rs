//! The file of a layer.

use std::fmt::Debug;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom};
use strake_block::lock::{self, Share};
use strake_block::{Access, Event, Image, ImageQueue, RawImage};
use strake_observe::{OsContext, Result};

use crate::memory::Memory;
use crate::num::{put, us};
use crate::{Damaged, Full};

/// Where the bytes of a layer are: a file that grows.
///
/// Tables go through the calls here, in the calling thread; data goes through queues. A call that
/// changes something has reached the file when it returns, and the disk after the next
/// [`sync`](Self::sync).
pub trait Store: Send + Sync + Debug {
    /// Its name for observations.
    fn path(&self) -> &str;

    /// Its length now.
    ///
    /// # Errors
    /// When the file system fails.
    fn len(&self) -> Result<u64>;

    /// Whether it has no byte.
    ///
    /// # Errors
    /// When the file system fails.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Makes it exactly that long; what is added reads as zeroes.
    ///
    /// # Errors
    /// When it cannot be that long.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Whether it can be made longer.
    fn grows(&self) -> bool;

    /// Fills `data` from `offset`; what is past the end reads as zeroes.
    ///
    /// # Errors
    /// When the device fails.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()>;

    /// Writes `data` at `offset`. Not safe beside another write to the same 4096 bytes.
    ///
    /// # Errors
    /// When the device fails or is full.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()>;

    /// Makes durable what was written.
    ///
    /// # Errors
    /// When the device fails.
    fn sync(&self) -> Result<()>;

    /// Gives the space of a range back. Best effort: it may read as anything afterwards.
    fn release(&self, range: Range<u64>);

    /// The first range at or after `from` that may hold something else than zeroes.
    ///
    /// # Errors
    /// When the file system fails.
    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>>;

    /// What the accesses of its queues are best multiples of, in bytes.
    fn block_bytes(&self) -> u64;

    /// A queue for data; see [`Image::open_queue`].
    ///
    /// # Errors
    /// When the host's I/O engine cannot be set up.
    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>>;

    /// Whether its last name was removed.
    ///
    /// # Errors
    /// When the file system fails.
    fn is_removed(&self) -> Result<bool>;

    /// Does what opening its first queue needs, as far as it can: queues of lower layers are opened
    /// by a virtqueue's thread when it first reads there, and that one may do little else.
    fn get_ready(&self) {}

    /// Changes the lock on it: others may read it too from now on, or nobody else may use it. False
    /// if somebody else's lock is in the way.
    ///
    /// # Errors
    /// When the file system has no locks.
    fn share(&self, share: Share) -> Result<bool> {
        let _ = share;
        Ok(true)
    }
}

/// A regular file or a block device.
#[derive(Debug)]
pub struct FileStore {
    fd: OwnedFd,
    path: String,
    access: Access,
    device: bool,
    /// What direct accesses must be multiples of; 1 if the page cache is used.
    block: u64,
    /// For the queues; made when the first is.
    raw: Mutex<Option<Arc<RawImage>>>,
}

/// Direct accesses of tables: no device wants more than this but very odd ones, and those say so.
const DIRECT_BLOCK: u64 = 4096;

impl FileStore {
    /// The file behind an open descriptor; `path` is for observations only. O_DIRECT is used if
    /// the descriptor has it.
    ///
    /// # Errors
    /// When it is neither a regular file nor a block device.
    pub fn from_fd(fd: OwnedFd, path: impl Into<String>, access: Access) -> Result<Self> {
        let path = path.into();
        let stat = rustix::fs::fstat(&fd).os("fstat", &path)?;
        let device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => {
                let what = "neither a file nor a block device".to_owned();
                return Err(strake_block::NotAnImage { path, what }.into());
            }
        };
        let direct = rustix::fs::fcntl_getfl(&fd)
            .os("fcntl", &path)?
            .contains(OFlags::DIRECT);
        Ok(Self {
            fd,
            path,
            access,
            device,
            block: if direct { DIRECT_BLOCK } else { 1 },
            raw: Mutex::new(None),
        })
    }

    fn raw(&self) -> Result<Arc<RawImage>> {
        let mut raw = self.raw.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(raw) = raw.as_ref() {
            return Ok(Arc::clone(raw));
        }
        let fd = self.fd.try_clone().os("dup", &self.path)?;
        let made = Arc::new(RawImage::growing(fd, self.path.clone(), self.access)?);
        *raw = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Reads into aligned memory from an aligned offset; says how much there was.
    fn read_blocks(&self, offset: u64, memory: &mut Memory) -> Result<usize> {
        let mut got = 0;
        while let Some(room) = memory
            .bytes_mut()
            .get_mut(got..)
            .filter(|it| !it.is_empty())
        {
            match rustix::io::pread(&self.fd, room, offset + got as u64) {
                Ok(0) => break,
                Ok(count) => {
                    got += count;
                    if self.block > 1 && !count.is_multiple_of(us(self.block)) {
                        break;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    return Err(error).os("pread", format!("{} at offset {offset}", self.path));
                }
            }
        }
        Ok(got)
    }
}

impl Store for FileStore {
    fn path(&self) -> &str {
        &self.path
    }

    fn len(&self) -> Result<u64> {
        if self.device {
            return rustix::fs::seek(&self.fd, SeekFrom::End(0)).os("lseek", &self.path);
        }
        let stat = rustix::fs::fstat(&self.fd).os("fstat", &self.path)?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        if self.device {
            if len <= self.len()? {
                return Ok(());
            }
            let why = format!("its device ends before byte {len}");
            let path = self.path.clone();
            return Err(Full { path, why }.into());
        }
        rustix::fs::ftruncate(&self.fd, len).os("ftruncate", &self.path)
    }

    fn grows(&self) -> bool {
        !self.device
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let start = offset - offset % self.block;
        let end = offset
            .checked_add(data.len() as u64)
            .and_then(|end| end.checked_next_multiple_of(self.block))
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or_else(|| Damaged {
                path: self.path.clone(),
                what: format!("it refers to offset {offset}, which no file reaches"),
            })?;
        let mut memory = Memory::new(us(end - start));
        let got = self.read_blocks(start, &mut memory)?;
        let skip = us(offset - start);
        let there = memory.bytes().get(skip..got).unwrap_or_default();
        let there = there.get(..there.len().min(data.len())).unwrap_or_default();
        put(data, 0, there);
        if let Some(rest) = data.get_mut(there.len()..) {
            rest.fill(0);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let start = offset - offset % self.block;
        let end = (offset + data.len() as u64).next_multiple_of(self.block);
        let mut memory = Memory::new(us(end - start));
        if start != offset || end != offset + data.len() as u64 {
            self.read_blocks(start, &mut memory)?;
        }
        put(memory.bytes_mut(), us(offset - start), data);
        let mut done = 0;
        while let Some(rest) = memory.bytes().get(done..).filter(|it| !it.is_empty()) {
            match rustix::io::pwrite(&self.fd, rest, start + done as u64) {
                Ok(0) => {
                    return Err(rustix::io::Errno::IO)
                        .os("pwrite", format!("{} at offset {offset}", self.path));
                }
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    return Err(error).os("pwrite", format!("{} at offset {offset}", self.path));
                }
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        rustix::fs::fdatasync(&self.fd).os("fdatasync", &self.path)
    }

    fn release(&self, range: Range<u64>) {
        if self.access == Access::ReadWrite {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // A file system that cannot keeps the space; the cluster is free all the same.
            let _ = rustix::fs::fallocate(&self.fd, flags, range.start, range.end - range.start);
        }
    }

    fn allocated(&self, from: u64) -> Result<Option<Range<u64>>> {
        let len = self.len()?;
        if from >= len {
            return Ok(None);
        }
        if self.device {
            return Ok(Some(from..len));
        }
        let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(from)) {
            Ok(start) => start.max(from),
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            Err(_) => return Ok(Some(from..len)),
        };
        let end = rustix::fs::seek(&self.fd, SeekFrom::Hole(start)).unwrap_or(len);
        // A file that changes between the two calls can give an empty range.
        Ok((start < len).then(|| start..end.clamp(start + 1, len)))
    }

    fn block_bytes(&self) -> u64 {
        self.raw().map_or(self.block, |raw| raw.block_bytes())
    }

    fn open_queue(&self, depth: u32, event: &Arc<Event>) -> Result<Box<dyn ImageQueue>> {
        self.raw()?.open_queue(depth, event)
    }

    fn is_removed(&self) -> Result<bool> {
        if self.device {
            return Ok(false);
        }
        let stat = rustix::fs::fstat(self.fd.as_fd()).os("fstat", &self.path)?;
        Ok(stat.st_nlink == 0)
    }

    fn get_ready(&self) {
        // What fails here fails when a queue is opened, which tells it.
        let _ = self.raw();
    }

    fn share(&self, share: Share) -> Result<bool> {
        lock::take(&self.fd, share).os("fcntl(F_OFD_SETLK)", &self.path)
    }
}
