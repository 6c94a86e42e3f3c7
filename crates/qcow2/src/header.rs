//! The header: parsed from bytes that anybody may have written.

use strake_observe::Result;

use crate::num::{be32, be64, put, us};
use crate::{Damaged, NotQcow2, Store, Unsupported};

const MAGIC: u32 = 0x5146_49fb;

/// The first bytes of the header that all versions have.
const V2_BYTES: usize = 72;

/// The header of version 3, without the fields that came later.
pub(crate) const V3_BYTES: usize = 104;

/// What this crate writes: with the compression type and its padding.
const OUR_BYTES: u32 = 112;

/// The longest name of a backing file, by the format.
pub(crate) const MAX_NAME: usize = 1023;

/// Tables larger than this are not believed (and not loaded): as other implementations have it.
const MAX_L1_BYTES: u64 = 32 * 1024 * 1024;
const MAX_TABLE_BYTES: u64 = 8 * 1024 * 1024;

pub(crate) const EXT_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURES: u32 = 0x6803_f857;
const EXT_END: u32 = 0;

/// More extensions than any image has.
const MAX_EXTENSIONS: usize = 64;

/// The part of a header that one write of a sector changes as a whole.
pub(crate) const ATOMIC: usize = 512;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const SUBCLUSTERS: u64 = 1 << 4;

/// The image below another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its name as the header has it, relative to the folder of the image that names it.
    pub path: String,
    /// Its format as the header has it, if it has one.
    pub format: Option<String>,
}

/// The header of a qcow2 file.
#[derive(Debug, Clone)]
pub struct Header {
    pub(crate) version: u32,
    pub(crate) backing: Option<Backing>,
    /// Where its name is in the file, and how long.
    pub(crate) backing_at: (u64, u32),
    pub(crate) cluster_bits: u32,
    pub(crate) size: u64,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) table_offset: u64,
    pub(crate) table_clusters: u32,
    pub(crate) incompatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) refcount_order: u32,
    pub(crate) header_bytes: u32,
    pub(crate) extensions: Vec<(u32, Vec<u8>)>,
    /// Where the extensions end.
    pub(crate) extensions_end: u64,
}

impl Header {
    /// The header at the start of a store.
    ///
    /// # Errors
    /// When there is none, or one that contradicts itself or uses what is not supported.
    pub fn read(store: &dyn Store) -> Result<Self> {
        let mut first = vec![0; ATOMIC];
        store.read_at(0, &mut first)?;
        let bits = be32(&first, 20).clamp(9, 21);
        let mut bytes = vec![0; 1 << bits];
        store.read_at(0, &mut bytes)?;
        Self::parse(&bytes, store.path())
    }

    /// The header in the bytes of a file's first cluster.
    ///
    /// # Errors
    /// When there is none, or one that contradicts itself or uses what is not supported.
    pub fn parse(bytes: &[u8], path: &str) -> Result<Self> {
        let damaged = |what: &str| Damaged {
            path: path.to_owned(),
            what: what.to_owned(),
        };
        let unsupported = |feature: &str| Unsupported {
            path: path.to_owned(),
            feature: feature.to_owned(),
        };
        if bytes.len() < ATOMIC || be32(bytes, 0) != MAGIC {
            let why = "it does not begin with the mark of the format".to_owned();
            return Err(NotQcow2 {
                path: path.to_owned(),
                why,
            }
            .into());
        }
        let version = be32(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(unsupported(&format!("version {version} of the format")).into());
        }
        let cluster_bits = be32(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged("its cluster size is none that the format allows").into());
        }
        let cluster = 1u64 << cluster_bits;
        let mut header = Self {
            version,
            backing: None,
            backing_at: (be64(bytes, 8), be32(bytes, 16)),
            cluster_bits,
            size: be64(bytes, 24),
            l1_entries: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            table_offset: be64(bytes, 48),
            table_clusters: be32(bytes, 56),
            incompatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_bytes: u32::try_from(V2_BYTES).unwrap_or(0),
            extensions: Vec::new(),
            extensions_end: 0,
        };
        if be32(bytes, 32) != 0 {
            return Err(unsupported("encryption").into());
        }
        if version == 3 {
            header.incompatible = be64(bytes, 72);
            header.autoclear = be64(bytes, 88);
            header.refcount_order = be32(bytes, 96);
            header.header_bytes = be32(bytes, 100);
            let fits = (V3_BYTES as u64..=cluster).contains(&u64::from(header.header_bytes));
            if !fits || !header.header_bytes.is_multiple_of(8) {
                return Err(damaged("the length of its header is impossible").into());
            }
            let bits = header.incompatible;
            if bits & DATA_FILE != 0 {
                return Err(unsupported("an external data file").into());
            }
            if bits & SUBCLUSTERS != 0 {
                return Err(unsupported("extended L2 entries").into());
            }
            let kind = bytes.get(V3_BYTES).copied().unwrap_or(0);
            if bits & COMPRESSION != 0 && header.header_bytes > 104 && kind != 0 {
                return Err(unsupported("a compression other than zlib").into());
            }
            if bits & !(DIRTY | CORRUPT | COMPRESSION) != 0 {
                return Err(unsupported(&format!("unknown features ({bits:#x})")).into());
            }
            if header.refcount_order > 6 {
                return Err(damaged("its reference counts are wider than 64 bits").into());
            }
        }
        header.check_tables(&damaged)?;
        header.parse_extensions(bytes, &damaged)?;
        header.parse_backing(bytes, &damaged)?;
        Ok(header)
    }

    fn check_tables(&self, damaged: &dyn Fn(&str) -> Damaged) -> Result<()> {
        let cluster = self.cluster();
        if self.size > i64::MAX as u64 {
            return Err(damaged("its disk is larger than any file").into());
        }
        if !self.l1_offset.is_multiple_of(cluster) || self.l1_offset > i64::MAX as u64 {
            return Err(damaged("its L1 table is not at a cluster").into());
        }
        if u64::from(self.l1_entries) * 8 > MAX_L1_BYTES {
            return Err(damaged("its L1 table is larger than the format allows").into());
        }
        if u64::from(self.l1_entries) < self.l1_needed(self.size) {
            return Err(damaged("its L1 table is too small for its disk").into());
        }
        if !self.table_offset.is_multiple_of(cluster)
            || self.table_offset > i64::MAX as u64
            || self.table_offset == 0
        {
            return Err(damaged("its refcount table is not at a cluster").into());
        }
        let bytes = u64::from(self.table_clusters) * cluster;
        if bytes == 0 || bytes > MAX_TABLE_BYTES.max(cluster) {
            return Err(damaged("the size of its refcount table is impossible").into());
        }
        Ok(())
    }

    fn parse_extensions(&mut self, bytes: &[u8], damaged: &dyn Fn(&str) -> Damaged) -> Result<()> {
        let mut at = us(u64::from(self.header_bytes));
        // Version 2 may have extensions too; they end where the backing file's name begins.
        let limit = match self.backing_at.0 {
            0 => bytes.len(),
            name => us(name).min(bytes.len()),
        };
        for _ in 0..MAX_EXTENSIONS {
            if at + 8 > limit {
                self.extensions_end = at as u64;
                return Ok(());
            }
            let (kind, len) = (be32(bytes, at), us(u64::from(be32(bytes, at + 4))));
            at += 8;
            if kind == EXT_END {
                self.extensions_end = at as u64;
                return Ok(());
            }
            let content = at
                .checked_add(len)
                .filter(|end| *end <= limit)
                .and_then(|end| bytes.get(at..end))
                .ok_or_else(|| damaged("an extension of its header reaches out of it"))?;
            self.extensions.push((kind, content.to_vec()));
            at = (at + len).next_multiple_of(8);
        }
        Err(damaged("its header has more extensions than any image has").into())
    }

    fn parse_backing(&mut self, bytes: &[u8], damaged: &dyn Fn(&str) -> Damaged) -> Result<()> {
        let (at, len) = (us(self.backing_at.0), us(u64::from(self.backing_at.1)));
        if at == 0 || len == 0 {
            return Ok(());
        }
        let name = at
            .checked_add(len)
            .and_then(|end| bytes.get(at..end))
            .filter(|name| name.len() <= MAX_NAME)
            .ok_or_else(|| damaged("the name of its backing file is not in its header"))?;
        let text = |bytes: &[u8]| {
            let text = std::str::from_utf8(bytes).ok()?;
            (!text.is_empty() && !text.contains('\0')).then(|| text.to_owned())
        };
        let path = text(name)
            .ok_or_else(|| damaged("the name of its backing file is not text without zeroes"))?;
        let format = self.extensions.iter().find(|(kind, _)| *kind == EXT_FORMAT);
        let format = match format {
            Some((_, name)) => Some(
                text(name).ok_or_else(|| damaged("the format of its backing file is not text"))?,
            ),
            None => None,
        };
        self.backing = Some(Backing { path, format });
        Ok(())
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The image below, if there is one.
    #[must_use]
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// How many L1 entries a disk of that size needs.
    pub(crate) fn l1_needed(&self, size: u64) -> u64 {
        let per_table = self.cluster() / 8;
        size.div_ceil(self.cluster()).div_ceil(per_table)
    }

    /// Why it must not be written, if so.
    pub(crate) fn unclean(&self) -> Option<&'static str> {
        if self.incompatible & CORRUPT != 0 {
            return Some("it is marked as corrupt");
        }
        if self.incompatible & DIRTY != 0 {
            return Some("it was not closed, and its reference counts are not kept up to date");
        }
        None
    }

    /// A header for a new file.
    pub(crate) fn fresh(cluster_bits: u32, size: u64, backing: Option<Backing>) -> Self {
        let mut extensions = Vec::new();
        if let Some(format) = backing.as_ref().and_then(|it| it.format.as_ref()) {
            extensions.push((EXT_FORMAT, format.clone().into_bytes()));
        }
        Self {
            version: 3,
            backing,
            backing_at: (0, 0),
            cluster_bits,
            size,
            l1_entries: 0,
            l1_offset: 0,
            table_offset: 0,
            table_clusters: 0,
            incompatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_bytes: OUR_BYTES,
            extensions,
            extensions_end: 0,
        }
    }

    /// The fixed fields over `first`, the first bytes of the file as they are.
    pub(crate) fn encode_fixed(&self, first: &mut [u8]) {
        put(first, 0, &MAGIC.to_be_bytes());
        put(first, 4, &self.version.to_be_bytes());
        put(first, 8, &self.backing_at.0.to_be_bytes());
        put(first, 16, &self.backing_at.1.to_be_bytes());
        put(first, 20, &self.cluster_bits.to_be_bytes());
        put(first, 24, &self.size.to_be_bytes());
        put(first, 36, &self.l1_entries.to_be_bytes());
        put(first, 40, &self.l1_offset.to_be_bytes());
        put(first, 48, &self.table_offset.to_be_bytes());
        put(first, 56, &self.table_clusters.to_be_bytes());
        if self.version >= 3 {
            put(first, 72, &self.incompatible.to_be_bytes());
            put(first, 88, &self.autoclear.to_be_bytes());
            put(first, 96, &self.refcount_order.to_be_bytes());
            put(first, 100, &self.header_bytes.to_be_bytes());
        }
    }

    /// The extensions as bytes. Those that only help people are left out if there is no room.
    pub(crate) fn encode_extensions(&self, room: usize) -> Option<Vec<u8>> {
        let encode = |all: bool| {
            let mut bytes = Vec::new();
            for (kind, content) in &self.extensions {
                if *kind == EXT_FEATURES && !all {
                    continue;
                }
                bytes.extend(kind.to_be_bytes());
                bytes.extend(u32::try_from(content.len()).unwrap_or(0).to_be_bytes());
                bytes.extend(content);
                bytes.resize(bytes.len().next_multiple_of(8), 0);
            }
            bytes.extend([0; 8]);
            bytes
        };
        [true, false]
            .into_iter()
            .map(encode)
            .find(|bytes| bytes.len() <= room)
    }

    /// Sets the image below; its name is written by the caller to `backing_at`.
    pub(crate) fn set_backing(&mut self, backing: Option<Backing>, at: u64) {
        self.extensions.retain(|(kind, _)| *kind != EXT_FORMAT);
        self.backing_at = (0, 0);
        if let Some(backing) = &backing {
            self.backing_at = (at, u32::try_from(backing.path.len()).unwrap_or(0));
            if let Some(format) = &backing.format {
                let format = format.clone().into_bytes();
                self.extensions.insert(0, (EXT_FORMAT, format));
            }
        }
        self.backing = backing;
    }
}
