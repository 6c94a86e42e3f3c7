//! A whole qcow2 image as anybody may have made it, with tables that contradict each other: it is
//! opened, read and written.
#![no_main]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use strake_block::{Access, Blocking, Image, Operation};
use strake_qcow2::{ChainPart, FileStore, Format, open_chain};

fuzz_target!(|input: (bool, [(u8, u32, u8); 6], &[u8])| {
    let (writable, acts, bytes) = input;
    // SAFETY: a plain call with a literal name; the descriptor is owned from here on.
    let file = unsafe {
        let fd = libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    let _ = file.write_all_at(bytes, 0);
    let access = if writable {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    };
    let Ok(store) = FileStore::from_fd(file.into(), "fuzz", access) else {
        return;
    };
    let part = ChainPart {
        store: Arc::new(store),
        format: Format::Qcow2,
        access,
    };
    let Ok(image) = open_chain(vec![part]) else {
        return;
    };
    // Larger ones differ in nothing but the time that looking through them takes.
    if image.size() > 1 << 30 {
        return;
    }
    let Ok(mut queue) = Blocking::new(&*image) else {
        return;
    };
    let mut data = vec![7; 255 * 512];
    for (kind, at, sectors) in acts {
        let len = u64::from(sectors) * 512;
        let at = u64::from(at) * 512 % image.size().max(512);
        let data = &mut data[..usize::from(sectors) * 512];
        let result = match kind % 6 {
            0 => queue.read(at, data),
            1 => queue.write(at, data),
            2 => queue.operate(Operation::Discard { len }, at),
            3 => queue.operate(Operation::WriteZeroes { len, unmap: kind > 99 }, at),
            4 => image.allocated(at).map(|_| ()),
            _ => queue.operate(Operation::Flush, 0),
        };
        if let Err(refused) = result {
            assert!(!refused.text().is_empty() && !refused.remedy().is_empty());
        }
    }
});
