//! Buffers against a model: one row of bytes.

use proptest::prelude::*;

use super::*;
use crate::testing::{HIGH_RAM_AT, Host, LOW_RAM};

fn buffers(parts: &[(u64, u32)]) -> Buffers {
    let mut buffers = Buffers::default();
    for (gpa, len) in parts {
        buffers.push(Part {
            gpa: *gpa,
            len: *len,
        });
    }
    buffers
}

#[test]
fn whatever_is_not_wholly_in_ram_is_refused() {
    let host = Host::default();
    let memory = host.memory();
    let end = LOW_RAM as u64;
    for (gpa, len) in [
        (end, 1),
        (end - 1, 2),
        (end - 1, u32::MAX),
        (HIGH_RAM_AT - 1, 2),
        (HIGH_RAM_AT - 1, 1),
        (0xc000_0000, 16),
        (u64::MAX, 1),
        (u64::MAX - 3, 16),
        (u64::MAX - 3, u32::MAX),
    ] {
        let bad = buffers(&[(0x1000, 16), (gpa, len)]);
        assert!(bad.host_ranges(&memory).is_err(), "{gpa:#x} {len}");
        assert!(
            bad.for_disk(&memory, 8, u64::MAX).is_err(),
            "{gpa:#x} {len}"
        );
        let all = usize::try_from(bad.len().min(64)).unwrap();
        assert!(
            bad.write(&memory, 0, &vec![0; all]).is_err(),
            "{gpa:#x} {len}"
        );
        assert!(
            bad.read(&memory, 0, &mut vec![0; all]).is_err(),
            "{gpa:#x} {len}"
        );
        // The good part alone is good.
        assert!(bad.read(&memory, 0, &mut [0; 16]).is_ok());
    }
    let whole = buffers(&[(0, u32::try_from(end).unwrap()), (HIGH_RAM_AT, 1 << 20)]);
    assert_eq!(whole.host_ranges(&memory).unwrap().len(), 2);
}

#[test]
fn more_than_there_is_cannot_be_read_or_written() {
    let host = Host::default();
    let memory = host.memory();
    let some = buffers(&[(0x1000, 4), (0x2000, 0), (0x3000, 4)]);
    assert_eq!(some.len(), 8);
    assert_eq!(some.parts().len(), 2);
    assert!(some.read(&memory, 0, &mut [0; 8]).is_ok());
    assert!(some.read(&memory, 0, &mut [0; 9]).is_err());
    assert!(some.read(&memory, 8, &mut [0; 1]).is_err());
    assert!(some.read(&memory, u64::MAX, &mut [0; 1]).is_err());
    assert!(some.read(&memory, u64::MAX, &mut []).is_ok());
    assert!(Buffers::default().write(&memory, 0, &[1]).is_err());
}

proptest! {
    #[test]
    fn pieces_behave_as_one_row_of_bytes(
        lens in prop::collection::vec(0u32..50, 0..8),
        skip in 0u64..200,
        len in 0usize..200,
        seed in any::<u8>(),
    ) {
        let host = Host::default();
        let memory = host.memory();
        let parts: Vec<(u64, u32)> = (1u64..).map(|n| n * 0x1000).zip(lens).collect();
        let row = buffers(&parts);
        let total = usize::try_from(row.len()).unwrap();
        let mut model: Vec<u8> = (0..total).map(|n| u8::try_from(n % 251).unwrap()).collect();
        row.write(&memory, 0, &model).unwrap();
        let data = vec![seed; len];
        let at = usize::try_from(skip).unwrap();
        let fits = at + len <= total || len == 0;
        prop_assert_eq!(row.write(&memory, skip, &data).is_ok(), fits);
        if fits && len > 0 {
            model[at..at + len].fill(seed);
            let mut back = vec![0; total];
            row.read(&memory, 0, &mut back).unwrap();
            prop_assert_eq!(back, model);
        }
        let covered: u64 = row.range(skip, len as u64).map(|part| u64::from(part.len)).sum();
        prop_assert_eq!(covered, (len as u64).min(row.len().saturating_sub(skip)));
    }
}
