//! A set of records.

use std::collections::BTreeMap;

use strake_observe::{Observation, Result};

use crate::checksum::crc32;
use crate::observations::{Damaged, LeftOver, Missing, TooLarge, TooNew};
use crate::value::{Malformed, Value, take_sized};

/// Bytes of a component's name or of a kind.
pub const NAME_LIMIT: usize = 255;

/// Bytes of one record's payload.
pub const PAYLOAD_LIMIT: usize = 4 << 20;

/// Records of a set.
pub const RECORD_LIMIT: usize = 4096;

/// Bytes of a set.
pub const SET_LIMIT: usize = 16 << 20;

const MAGIC: &[u8; 8] = b"STRAKEST";
const FORMAT: u16 = 1;

/// A type that is a record of its own. Declared by [`saved!`](crate::saved!).
pub trait Saved: Value {
    /// What it is, once and for all.
    const KIND: &'static str;

    /// The version that is written; all before are read.
    const VERSION: u16;
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    version: u16,
    payload: Vec<u8>,
}

/// What a machine's components remember: at most one record of a kind for each component.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records(BTreeMap<(String, String), Record>);

impl Records {
    /// Adds a component's record.
    ///
    /// # Errors
    /// [`TooLarge`]: a limit of this module is reached, or the component has such a record already.
    pub fn put<T: Saved>(&mut self, component: &str, value: &T) -> Result<()> {
        let refused = |what: &str| {
            Observation::from(TooLarge {
                component: component.to_owned(),
                what: format!("{what} ('{}')", T::KIND),
            })
        };
        let mut payload = Vec::new();
        value.put(&mut payload);
        if payload.len() > PAYLOAD_LIMIT {
            return Err(refused("its record is too long"));
        }
        if component.len() > NAME_LIMIT || self.0.len() >= RECORD_LIMIT {
            return Err(refused(
                "its name is too long, or there are too many records",
            ));
        }
        let record = Record {
            version: T::VERSION,
            payload,
        };
        let key = (component.to_owned(), T::KIND.to_owned());
        match self.0.insert(key, record) {
            None => Ok(()),
            Some(_) => Err(refused("two of its records are of the same kind")),
        }
    }

    /// Takes a component's record out.
    ///
    /// # Errors
    /// [`Missing`], [`TooNew`] or [`Damaged`].
    pub fn take<T: Saved>(&mut self, component: &str) -> Result<T> {
        let key = (component.to_owned(), T::KIND.to_owned());
        let record = self.0.remove(&key).ok_or_else(|| Missing {
            component: component.to_owned(),
            kind: T::KIND.to_owned(),
        })?;
        if record.version > T::VERSION {
            return Err(TooNew {
                component: component.to_owned(),
                kind: T::KIND.to_owned(),
                version: record.version,
                known: T::VERSION,
            }
            .into());
        }
        T::get(&record.payload, record.version).map_err(|why| {
            let record = format!("'{}' version {} of '{component}'", T::KIND, record.version);
            damaged(record, why)
        })
    }

    /// Whether a component has a record of this kind, of whatever version.
    #[must_use]
    pub fn has<T: Saved>(&self, component: &str) -> bool {
        self.0
            .contains_key(&(component.to_owned(), T::KIND.to_owned()))
    }

    /// Adds a record of any form, as a damaged or hostile process may send it.
    #[cfg(any(test, feature = "testing"))]
    pub fn put_any(&mut self, component: &str, kind: &str, version: u16, payload: Vec<u8>) {
        let key = (component.to_owned(), kind.to_owned());
        self.0.insert(key, Record { version, payload });
    }

    /// Makes sure that every record was taken.
    ///
    /// # Errors
    /// [`LeftOver`].
    pub fn finish(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let records = self.0.into_keys();
        Err(LeftOver {
            records: records
                .map(|(component, kind)| format!("{component}/{kind}"))
                .collect(),
        }
        .into())
    }

    /// The set as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(FORMAT.to_le_bytes());
        out.extend([0; 2]);
        out.extend(
            u32::try_from(self.0.len())
                .unwrap_or(u32::MAX)
                .to_le_bytes(),
        );
        for ((component, kind), record) in &self.0 {
            let at = out.len();
            for text in [component, kind] {
                out.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
                out.extend(text.bytes().take(NAME_LIMIT));
            }
            out.extend(record.version.to_le_bytes());
            crate::value::put_sized(&mut out, |out| out.extend(&record.payload));
            let sum = crc32(out.get(at..).unwrap_or_default());
            out.extend(sum.to_le_bytes());
        }
        out
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`Damaged`], or [`TooNew`] if the form itself is of a newer program.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let set = |why: &str| damaged("the set of records".to_owned(), Malformed::new(why));
        if bytes.len() > SET_LIMIT {
            return Err(set("it is too long"));
        }
        let Some((magic, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(set("it is cut off"));
        };
        if magic != MAGIC {
            return Err(set("it does not begin like one"));
        }
        let Some((header, mut rest)) = rest.split_first_chunk::<8>() else {
            return Err(set("it is cut off"));
        };
        let [f0, f1, 0, 0, c0, c1, c2, c3] = *header else {
            return Err(set("its header is wrong"));
        };
        let format = u16::from_le_bytes([f0, f1]);
        if format != FORMAT {
            return Err(TooNew {
                component: "the set of records".to_owned(),
                kind: "format".to_owned(),
                version: format,
                known: FORMAT,
            }
            .into());
        }
        let count = u32::from_le_bytes([c0, c1, c2, c3]) as usize;
        if count > RECORD_LIMIT {
            return Err(set("it has too many records"));
        }
        let mut records = Self::default();
        for index in 0..count {
            let of = || format!("record {index}");
            let (key, record, after) =
                one(rest).ok_or_else(|| damaged(of(), Malformed::new("it is cut off")))?;
            let length = rest.len() - after.len();
            let (sum, after) = after
                .split_first_chunk::<4>()
                .ok_or_else(|| damaged(of(), Malformed::new("it is cut off")))?;
            let named = || format!("record '{}' of '{}'", key.1, key.0);
            if crc32(rest.get(..length).unwrap_or_default()) != u32::from_le_bytes(*sum) {
                return Err(damaged(named(), Malformed::new("its checksum is wrong")));
            }
            if records.0.contains_key(&key) {
                return Err(damaged(named(), Malformed::new("it is there twice")));
            }
            records.0.insert(key, record);
            rest = after;
        }
        if rest.is_empty() {
            Ok(records)
        } else {
            Err(set("something follows its last record"))
        }
    }
}

type Key = (String, String);

fn one(bytes: &[u8]) -> Option<(Key, Record, &[u8])> {
    let (component, rest) = text(bytes)?;
    let (kind, rest) = text(rest)?;
    let (version, rest) = rest.split_first_chunk::<2>()?;
    let (payload, rest) = take_sized(rest)?;
    let record = Record {
        version: u16::from_le_bytes(*version),
        payload: payload.to_vec(),
    };
    Some(((component, kind), record, rest))
}

fn text(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (length, rest) = bytes.split_first()?;
    let (text, rest) = rest.split_at_checked(usize::from(*length))?;
    Some((std::str::from_utf8(text).ok()?.to_owned(), rest))
}

fn damaged(record: String, why: Malformed) -> Observation {
    Damaged {
        record,
        reason: why.0,
    }
    .into()
}
