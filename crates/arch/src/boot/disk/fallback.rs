//! Disks without a boot configuration: the kernel at a well-known name.

use strake_observe::Task;

use super::candidate::Candidate;
use super::version;
use super::volume::Volume;

/// Kernels of one directory that are tried, newest first.
const MOST: usize = 8;

/// Debian's links, and images that have one kernel without a version.
pub(super) fn links(volume: &Volume, _task: &mut Task) -> Vec<Candidate> {
    const PAIRS: &[(&str, &[&str])] = &[
        ("/vmlinuz", &["/initrd.img", "/initrd"]),
        (
            "/boot/vmlinuz",
            &["/boot/initrd.img", "/boot/initrd", "/boot/initramfs"],
        ),
        ("/boot/bzImage", &["/boot/initrd.img", "/boot/initrd"]),
    ];
    PAIRS
        .iter()
        .filter(|(kernel, _)| volume.has(kernel))
        .map(|(kernel, initrds)| Candidate {
            entry: (*kernel).to_owned(),
            kernel: (*kernel).to_owned(),
            initrds: initrds
                .iter()
                .find(|path| volume.has(path))
                .map(|path| (*path).to_owned())
                .into_iter()
                .collect(),
            ..Candidate::default()
        })
        .collect()
}

/// The newest `vmlinuz-VERSION` with the initial RAM disk of that version.
pub(super) fn newest(volume: &Volume, task: &mut Task) -> Vec<Candidate> {
    for directory in ["/boot", ""] {
        let names = task
            .attempt(volume.names(if directory.is_empty() { "/" } else { directory }))
            .unwrap_or_default();
        let mut versions: Vec<&str> = names
            .iter()
            .filter_map(|name| name.strip_prefix("vmlinuz-"))
            .filter(|version| !version.ends_with(".old") && !version.ends_with(".hmac"))
            .collect();
        versions.sort_by(|left, right| {
            let rescue = |version: &str| version.contains("rescue");
            rescue(left)
                .cmp(&rescue(right))
                .then_with(|| version::compare(right, left))
        });
        if versions.is_empty() {
            continue;
        }
        return versions
            .into_iter()
            .take(MOST)
            .map(|version| {
                let initrd = [
                    format!("initrd.img-{version}"),
                    format!("initramfs-{version}.img"),
                    format!("initrd-{version}"),
                    format!("initramfs-{version}"),
                ];
                Candidate {
                    entry: format!("{directory}/vmlinuz-{version}"),
                    kernel: format!("{directory}/vmlinuz-{version}"),
                    initrds: initrd
                        .iter()
                        .find(|name| names.contains(name))
                        .map(|name| format!("{directory}/{name}"))
                        .into_iter()
                        .collect(),
                    ..Candidate::default()
                }
            })
            .collect();
    }
    Vec::new()
}
