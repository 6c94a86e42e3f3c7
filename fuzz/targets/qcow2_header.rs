//! A qcow2 header as anybody may have made it, and the list of a chain that begins with it.
#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use strake_qcow2::{Format, Header, survey};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::parse(bytes, "fuzz") {
        assert!((9..=21).contains(&header.cluster().trailing_zeros()));
        if let Some(backing) = header.backing() {
            assert!(!backing.path.is_empty() && !backing.path.contains('\0'));
        }
    }
    // SAFETY: a plain call with a literal name; the descriptor is owned from here on.
    let file = unsafe {
        let fd = libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    let _ = file.write_all_at(bytes, 0);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // No file but the first is allowed: what it names must not be looked into.
    match survey(Path::new(&path), Format::Qcow2, &|_| false) {
        Ok(members) => assert_eq!(members.len(), 1),
        Err(refused) => assert!(!refused.text().is_empty() && !refused.remedy().is_empty()),
    }
});
