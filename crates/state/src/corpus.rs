//! Compatibility tests against stored records.
//!
//! A crate that declares records keeps one of each version that was ever released in a folder, as
//! hexadecimal text, and a test of it calls [`check`]. A new record is stored by running that test
//! with `STRAKE_STORE_RECORDS=1`; one that is there is never changed.
#![allow(clippy::panic)] // It is a test.

use std::path::Path;

use crate::{Records, Saved};

/// A record and what it is expected to be.
pub struct Sample {
    kind: &'static str,
    version: u16,
    bytes: Vec<u8>,
    /// Reads the stored bytes of a version; says what does not fit.
    read: Reader,
}

impl std::fmt::Debug for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sample").field("kind", &self.kind).finish()
    }
}

type Reader = Box<dyn Fn(&[u8], u16) -> Result<(), String>>;

const COMPONENT: &str = "stored";

impl Sample {
    /// A record of the version that is written now.
    #[must_use]
    pub fn of<T: Saved + PartialEq + std::fmt::Debug + 'static>(value: T) -> Self {
        let mut records = Records::default();
        let put = records.put(COMPONENT, &value);
        assert!(put.is_ok(), "{put:?}");
        Self {
            kind: T::KIND,
            version: T::VERSION,
            bytes: records.encode(),
            read: Box::new(move |bytes, version| {
                let read = Records::decode(bytes).and_then(|mut records| {
                    let read = records.take::<T>(COMPONENT)?;
                    records.finish()?;
                    Ok(read)
                });
                let read = read.map_err(|seen| seen.to_string())?;
                if version == T::VERSION && read != value {
                    return Err(format!("it reads as {read:?}"));
                }
                Ok(())
            }),
        }
    }
}

/// Makes sure that the folder has a record of each version of each kind, that all of them are read,
/// and that it has none that nobody reads.
///
/// # Panics
/// If that is not so.
pub fn check(folder: &Path, samples: &[Sample]) {
    let store = std::env::var_os("STRAKE_STORE_RECORDS").is_some();
    let mut expected = Vec::new();
    for sample in samples {
        for version in 1..=sample.version {
            let name = format!("{}.{version}.hex", sample.kind);
            let path = folder.join(&name);
            if store && version == sample.version && !path.exists() {
                let written = std::fs::create_dir_all(folder)
                    .and_then(|()| std::fs::write(&path, to_hex(&sample.bytes)));
                assert!(written.is_ok(), "{}: {written:?}", path.display());
            }
            let Ok(text) = std::fs::read_to_string(&path) else {
                panic!(
                    "there is no stored record {}: run this test with STRAKE_STORE_RECORDS=1",
                    path.display()
                );
            };
            let Some(bytes) = from_hex(&text) else {
                panic!("{} is not hexadecimal", path.display());
            };
            if let Err(why) = (sample.read)(&bytes, version) {
                panic!(
                    "the stored record {} is not understood: {why}",
                    path.display()
                );
            }
            if version == sample.version {
                assert!(
                    bytes == sample.bytes,
                    "{} is not what is written today: a changed record needs a new version",
                    path.display()
                );
            }
            expected.push(name);
        }
    }
    let found = std::fs::read_dir(folder).map(|entries| {
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.collect::<Vec<_>>()
    });
    for name in found.unwrap_or_default() {
        assert!(
            expected.contains(&name),
            "nobody reads the stored record {name}"
        );
    }
}

fn to_hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in bytes.chunks(32) {
        text.extend(line.iter().map(|byte| format!("{byte:02x}")));
        text.push('\n');
    }
    text
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| !c.is_whitespace())
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty()
        .then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}
