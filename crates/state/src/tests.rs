use proptest::prelude::*;

use crate::observations::{Damaged, LeftOver, Missing, TooNew};
use crate::{Blob, Records, Saved};

mod first {
    crate::saved! {
        /// The first version.
        pub(super) record SavedThing("thing", version 1) {
            /// A number.
            1 => number: u32,
            /// Parts.
            2 => parts: Vec<SavedPart>,
        }

        /// A part.
        pub(super) part SavedPart {
            /// Its name.
            1 => name: String,
        }
    }
}

crate::saved! {
    /// A version later.
    record SavedThing("thing", version 2) {
        /// A number.
        1 => number: u32,
        /// Parts.
        2 => parts: Vec<SavedPart>,
        /// What came later.
        3 => bytes: Blob [since 2, otherwise Blob(vec![9])],
    }

    /// A part.
    part SavedPart {
        /// Its name.
        1 => name: String,
        /// Also later.
        2 => place: Option<u64> [since 2, otherwise None],
    }
}

fn thing() -> SavedThing {
    SavedThing {
        number: 7,
        parts: vec![
            SavedPart {
                name: "a".into(),
                place: Some(1),
            },
            SavedPart {
                name: String::new(),
                place: None,
            },
        ],
        bytes: Blob(vec![1, 2, 3]),
    }
}

fn old() -> first::SavedThing {
    first::SavedThing {
        number: 5,
        parts: vec![first::SavedPart { name: "old".into() }],
    }
}

fn set(value: &impl Saved) -> Records {
    let mut records = Records::default();
    records.put("one", value).unwrap();
    records
}

#[test]
fn what_was_saved_is_read_again() {
    let bytes = set(&thing()).encode();
    let mut read = Records::decode(&bytes).unwrap();
    assert_eq!(read.take::<SavedThing>("one").unwrap(), thing());
    read.finish().unwrap();
}

#[test]
fn an_older_version_is_read_with_what_it_meant() {
    let mut read = Records::decode(&set(&old()).encode()).unwrap();
    let read = read.take::<SavedThing>("one").unwrap();
    assert_eq!((read.number, read.bytes), (5, Blob(vec![9])));
    assert_eq!(read.parts[0].place, None);
}

#[test]
fn a_newer_version_is_refused_by_name() {
    let seen = set(&thing())
        .take::<first::SavedThing>("one")
        .expect_err("it is newer");
    assert!(seen.is::<TooNew>());
    assert!(seen.text().contains("'thing' version 2"), "{}", seen.text());
}

#[test]
fn what_nobody_takes_and_what_is_not_there_is_named() {
    let mut records = set(&thing());
    let seen = records.take::<SavedThing>("two").expect_err("no such");
    assert!(seen.is::<Missing>() && seen.text().contains("two"));
    let seen = records.finish().expect_err("one is left");
    assert!(seen.is::<LeftOver>() && seen.text().contains("one/thing"));
    assert!(set(&thing()).put("one", &thing()).is_err());
}

/// Fields of another version than the record's are damage: nobody guesses.
#[test]
fn fields_that_a_version_does_not_have_are_refused() {
    crate::saved! {
        /// Claims to be the first version.
        record Liar("thing", version 1) {
            /// A number.
            1 => number: u32,
            /// Parts.
            2 => parts: Vec<SavedPart>,
            /// Too early.
            3 => bytes: Blob,
        }

        /// Knows a field that nobody else does.
        record Talker("thing", version 2) {
            /// A number.
            1 => number: u32,
            /// Parts.
            2 => parts: Vec<SavedPart>,
            /// Bytes.
            3 => bytes: Blob,
            /// Unknown.
            77 => more: u8,
        }

        /// Lacks one.
        record Silent("thing", version 2) {
            /// A number.
            1 => number: u32,
        }
    }
    let liar = Liar {
        number: 1,
        parts: Vec::new(),
        bytes: Blob::default(),
    };
    let talker = Talker {
        number: 1,
        parts: Vec::new(),
        bytes: Blob::default(),
        more: 1,
    };
    for (mut records, named) in [
        (set(&liar), "bytes"),
        (set(&talker), "77"),
        (set(&Silent { number: 1 }), "parts"),
    ] {
        let seen = records.take::<SavedThing>("one").expect_err(named);
        assert!(seen.is::<Damaged>(), "{seen}");
        assert!(seen.text().contains(named), "{seen}");
    }
}

#[test]
fn every_damaged_bit_is_noticed() {
    let bytes = set(&thing()).encode();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            let read = Records::decode(&damaged);
            // The lengths and the checksum cover everything but the number of records, which the
            // end of the bytes does.
            assert!(read.is_err(), "byte {at}, bit {bit}");
        }
        assert!(Records::decode(&bytes[..at]).is_err());
    }
}

proptest! {
    #[test]
    fn any_bytes_are_an_observation(bytes: Vec<u8>) {
        let _ = Records::decode(&bytes);
    }

    /// With a checksum that is right: a payload of any bytes.
    #[test]
    fn any_payload_is_an_observation(payload: Vec<u8>, version in 0u16..4) {
        use crate::Value;
        if let Ok(read) = SavedThing::get(&payload, version) {
            let mut again = Vec::new();
            read.put(&mut again);
            prop_assert_eq!(SavedThing::get(&again, 2), Ok(read));
        }
    }

    #[test]
    fn all_values_survive(number: u32, names: Vec<String>, bytes: Vec<u8>) {
        let parts = names.into_iter().map(|name| SavedPart { name, place: Some(3) });
        let value = SavedThing { number, parts: parts.collect(), bytes: Blob(bytes) };
        let mut read = Records::decode(&set(&value).encode()).unwrap();
        prop_assert_eq!(read.take::<SavedThing>("one").unwrap(), value);
    }
}
