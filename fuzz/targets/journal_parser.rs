//! A migration's journal, as a crash or anybody may leave it. Its checksum is made right, so that
//! the fuzzer gets past it.
#![no_main]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;

const SLOT_BYTES: u64 = 16 * 1024;

fn crc32c(bytes: impl Iterator<Item = u8>) -> u32 {
    !bytes.fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}

fuzz_target!(|input: (bool, u64, u64, &[u8], &[u8])| {
    let (right, one, two, first, second) = input;
    // SAFETY: a plain call with a literal name; the descriptor is owned from here on.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"journal".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    for (slot, sequence, payload) in [(0, one, first), (1, two, second)] {
        if !right {
            let _ = file.write_all_at(payload, slot * SLOT_BYTES);
            continue;
        }
        let mut bytes = b"STRAKEJ\n".to_vec();
        bytes.extend(1u32.to_le_bytes());
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(sequence.to_le_bytes());
        let sum = crc32c(bytes.iter().chain(payload).copied());
        bytes.extend(sum.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        let _ = file.write_all_at(&bytes, slot * SLOT_BYTES);
    }
    if let Err(refused) = strake_block::journal::read(&mut file) {
        assert!(!refused.text().is_empty() && !refused.remedy().is_empty());
    }
});
