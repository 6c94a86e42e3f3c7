//! Disks made by `mke2fs`, with the configurations that distributions write, and damaged ones.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex};

use proptest::prelude::*;
use strake_observe::OsCallFailed;

use super::*;
use crate::layout::MIB;

const UUID: &str = "6a1bb33f-0000-4000-8000-0123456789ab";
const OTHER: &str = "6a1bb33f-1111-4000-8000-0123456789ab";
const PARTUUID: &str = "11223344-5566-7788-99aa-bbccddeeff00";

/// A disk in memory.
struct Bytes(Arc<Vec<u8>>);

impl ReadAt for Bytes {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let at = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.0[at..at + data.len()]);
        Ok(())
    }
}

fn boot(image: Vec<u8>) -> Result<DiskBoot> {
    find(Box::new(Bytes(Arc::new(image))))
}

/// What to put into a file system.
enum Node<'a> {
    File(&'a str, &'a [u8]),
    Link(&'a str, &'a str),
}
use Node::{File, Link};

fn fill(directory: &Path, nodes: &[Node<'_>]) {
    for node in nodes {
        let (File(path, _) | Link(path, _)) = node;
        let path = directory.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match node {
            File(_, bytes) => fs::write(path, bytes).unwrap(),
            Link(_, target) => symlink(target, path).unwrap(),
        }
    }
}

fn mke2fs(kind: &str, uuid: &str, size: u64, nodes: &[Node<'_>]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fill(&tree, nodes);
    let image = directory.path().join("image");
    fs::File::create(&image).unwrap().set_len(size).unwrap();
    let made = ["/usr/sbin/mke2fs", "/sbin/mke2fs", "mke2fs"]
        .iter()
        .find_map(|program| {
            Command::new(program)
                .args(["-q", "-F", "-t", kind, "-U", uuid, "-d"])
                .arg(&tree)
                .arg(&image)
                .output()
                .ok()
        })
        .expect("mke2fs (e2fsprogs) is needed");
    assert!(made.status.success(), "{made:?}");
    fs::read(image).unwrap()
}

fn ext4(nodes: &[Node<'_>]) -> Vec<u8> {
    mke2fs("ext4", UUID, 8 * MIB, nodes)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A GPT disk: partition 1 is something else, then the given ones from number 2 on.
fn gpt(parts: &[Vec<u8>], sector: usize) -> Vec<u8> {
    const FIRST: usize = 1 << 20;
    let mut disk = vec![0; FIRST];
    put(&mut disk, 510, &[0x55, 0xaa]);
    disk[450] = 0xee;
    put(&mut disk, sector, b"EFI PART");
    put(&mut disk, sector + 72, &2_u64.to_le_bytes());
    put(&mut disk, sector + 80, &128_u32.to_le_bytes());
    put(&mut disk, sector + 84, &128_u32.to_le_bytes());
    let small = vec![0; 1 << 16];
    for (index, part) in [small].iter().chain(parts).enumerate() {
        let (first, entry) = (disk.len() / sector, 2 * sector + index * 128);
        let last = first + part.len() / sector - 1;
        put(&mut disk, entry, &[0xaf; 16]);
        let id = [
            0x44,
            0x33,
            0x22,
            0x11,
            0x66,
            0x55,
            0x88,
            0x77,
            0x99,
            0xaa,
            0xbb,
            0xcc,
            0xdd,
            0xee,
            0xff,
            u8::try_from(index).unwrap().wrapping_sub(1),
        ];
        put(&mut disk, entry + 16, &id);
        put(&mut disk, entry + 32, &(first as u64).to_le_bytes());
        put(&mut disk, entry + 40, &(last as u64).to_le_bytes());
        disk.extend(part);
    }
    disk
}

fn mbr_entry(disk: &mut [u8], at: usize, slot: usize, kind: u8, first: usize, bytes: usize) {
    let entry = at + 446 + slot * 16;
    disk[entry + 4] = kind;
    put(
        disk,
        entry + 8,
        &u32::try_from(first / 512).unwrap().to_le_bytes(),
    );
    put(
        disk,
        entry + 12,
        &u32::try_from(bytes / 512).unwrap().to_le_bytes(),
    );
    put(disk, at + 510, &[0x55, 0xaa]);
}

fn debian_cfg(uuid: &str) -> Vec<u8> {
    grub::tests::DEBIAN
        .replace("DEFAULT", "0")
        .replace("UUID=UUID", &format!("UUID={UUID}"))
        .replace("root UUID", &format!("root {uuid}"))
        .into_bytes()
}

#[test]
fn debian_on_gpt() {
    let cfg = debian_cfg(UUID);
    let root = ext4(&[
        File("boot/grub/grub.cfg", &cfg),
        File("boot/vmlinuz-6.1.0-18-amd64", b"kernel 18"),
        File("boot/initrd.img-6.1.0-18-amd64", b"initrd 18"),
        File("boot/vmlinuz-6.1.0-99-amd64", b"not the default"),
        Link("vmlinuz", "boot/vmlinuz-6.1.0-99-amd64"),
    ]);
    for sector in [512, 4096] {
        let found = boot(gpt(std::slice::from_ref(&root), sector)).unwrap();
        assert_eq!(found.kernel, b"kernel 18");
        assert_eq!(found.initrd.as_deref(), Some(&b"initrd 18"[..]));
        assert!(
            found
                .cmdline
                .starts_with(&format!("root=UUID={UUID} ro quiet"))
        );
        assert_eq!(
            found.entry,
            "/boot/grub/grub.cfg 'Debian GNU/Linux' on partition 2"
        );
    }
}

#[test]
fn a_boot_partition_of_its_own() {
    // Paths are relative to the boot partition; the root is another one.
    let cfg = String::from_utf8(debian_cfg(OTHER))
        .unwrap()
        .replace("/boot/", "/")
        .replace(&format!("root=UUID={UUID} "), "");
    let boots = mke2fs(
        "ext2",
        OTHER,
        4 * MIB,
        &[
            File("grub/grub.cfg", cfg.as_bytes()),
            File("vmlinuz-6.1.0-18-amd64", b"kernel"),
            File("initrd.img-6.1.0-18-amd64", b"initrd"),
        ],
    );
    let root = ext4(&[File("etc/os-release", b"ID=debian\n")]);
    for order in [[&boots, &root], [&root, &boots]] {
        let found = boot(gpt(&order.map(Clone::clone), 512)).unwrap();
        assert_eq!(found.kernel, b"kernel");
        assert!(
            found
                .cmdline
                .starts_with(&format!("root=UUID={UUID} ro quiet")),
            "{}",
            found.cmdline
        );
    }
}

#[test]
fn mbr_with_a_logical_partition() {
    let root = ext4(&[File("vmlinuz", b"kernel"), File("sbin/init", b"")]);
    let mib = 1 << 20;
    let mut disk = vec![0; 3 * mib];
    put(&mut disk, 440, &0xcafe_0123_u32.to_le_bytes());
    mbr_entry(&mut disk, 0, 0, 0x82, mib, mib);
    mbr_entry(&mut disk, 0, 3, 0x05, 2 * mib, root.len() + mib);
    mbr_entry(&mut disk, 2 * mib, 0, 0x83, mib, root.len());
    disk.extend(&root);
    let found = boot(disk.clone()).unwrap();
    assert_eq!(found.kernel, b"kernel");
    assert_eq!(found.initrd, None);
    assert_eq!(found.cmdline, "root=PARTUUID=cafe0123-05 ro");
    assert_eq!(found.entry, "/vmlinuz on partition 5");

    // A chain of tables that leads back to itself ends.
    mbr_entry(&mut disk, 2 * mib, 1, 0x05, 0, mib);
    put(&mut disk, 2 * mib + 446 + 16 + 8, &1_u32.to_le_bytes());
    disk.copy_within(2 * mib..2 * mib + 512, 2 * mib + 512);
    assert_eq!(boot(disk).unwrap().kernel, b"kernel");
}

#[test]
fn debians_links_on_an_unpartitioned_disk() {
    for kind in ["ext2", "ext3", "ext4"] {
        let image = mke2fs(
            kind,
            UUID,
            8 * MIB,
            &[
                File("boot/vmlinuz-6.1.0-18-amd64", b"kernel"),
                File("boot/initrd.img-6.1.0-18-amd64", b"initrd"),
                Link("vmlinuz", "boot/vmlinuz-6.1.0-18-amd64"),
                Link("initrd.img", "/boot/../boot/./initrd.img-6.1.0-18-amd64"),
            ],
        );
        let found = boot(image).unwrap();
        assert_eq!(found.kernel, b"kernel");
        assert_eq!(found.initrd.as_deref(), Some(&b"initrd"[..]));
        assert_eq!(found.cmdline, format!("root=UUID={UUID} ro"));
        assert_eq!(found.entry, "/vmlinuz on the whole disk");
    }
}

#[test]
fn the_newest_kernel_without_any_configuration() {
    let found = boot(gpt(
        &[ext4(&[
            File("boot/vmlinuz-6.1.0-9-amd64", b"9"),
            File("boot/vmlinuz-6.1.0-18-amd64", b"18"),
            File("boot/vmlinuz-0-rescue-abc", b"rescue"),
            File("boot/vmlinuz-7.0.old", b"old"),
            File("boot/initramfs-6.1.0-18-amd64.img", b"initramfs"),
        ])],
        512,
    ))
    .unwrap();
    assert_eq!(found.kernel, b"18");
    assert_eq!(found.initrd.as_deref(), Some(&b"initramfs"[..]));
    assert_eq!(found.entry, "/boot/vmlinuz-6.1.0-18-amd64 on partition 2");

    let found = boot(gpt(&[ext4(&[File("boot/vmlinuz-6", b"k")])], 512)).unwrap();
    assert_eq!(found.cmdline, format!("root=PARTUUID={PARTUUID} ro"));
}

#[test]
fn extlinux_and_boot_loader_specification() {
    let conf = b"default alpine\nlabel alpine\n kernel vmlinuz-lts\n initrd initramfs-lts\n \
        append root=LABEL=/ modules=ext4 rw\n";
    let found = boot(ext4(&[
        File("boot/extlinux.conf", conf),
        File("boot/vmlinuz-lts", b"kernel"),
        File("boot/initramfs-lts", b"initramfs"),
    ]))
    .unwrap();
    assert_eq!(found.kernel, b"kernel");
    assert_eq!(found.cmdline, "root=LABEL=/ modules=ext4 rw");
    assert_eq!(
        found.entry,
        "/boot/extlinux.conf 'alpine' on the whole disk"
    );

    let entry = |version: &str| {
        format!(
            "title Fedora ({version})\nversion {version}\nlinux /vmlinuz-{version}\n\
             initrd /initramfs-{version}.img\noptions root=UUID=x ro $kernelopts\n"
        )
    };
    let (old, new) = (entry("6.5.6"), entry("6.5.12"));
    let mut nodes = vec![
        File("boot/loader/entries/abc-6.5.6.conf", old.as_bytes()),
        File("boot/loader/entries/abc-6.5.12.conf", new.as_bytes()),
        File("boot/grub2/grub.cfg", b"insmod blscfg\nblscfg\n"),
        File("boot/vmlinuz-6.5.12", b"new"),
        File("boot/initramfs-6.5.12.img", b"new initramfs"),
        File("boot/vmlinuz-6.5.6", b"old"),
        File("boot/initramfs-6.5.6.img", b"old initramfs"),
    ];
    let found = boot(ext4(&nodes)).unwrap();
    assert_eq!(found.kernel, b"new");
    assert_eq!(found.cmdline, "root=UUID=x ro");
    nodes.push(File(
        "boot/grub2/grubenv",
        b"# GRUB Environment Block\nsaved_entry=abc-6.5.6\nkernelopts=quiet\n####",
    ));
    let found = boot(ext4(&nodes)).unwrap();
    assert_eq!(found.kernel, b"old");
    assert_eq!(found.initrd.as_deref(), Some(&b"old initramfs"[..]));
    assert_eq!(found.cmdline, "root=UUID=x ro quiet");
}

#[test]
fn several_ram_disks_are_joined_at_multiples_of_four() {
    let found = boot(ext4(&[
        File(
            "boot/grub/grub.cfg",
            b"menuentry x { linux /k; initrd /a /b }\n",
        ),
        File("k", b"kernel"),
        File("a", b"12345"),
        File("b", b"678"),
    ]))
    .unwrap();
    assert_eq!(found.initrd.as_deref(), Some(&b"12345\x00\x00\x00678"[..]));
}

#[test]
fn an_entry_that_cannot_be_used_is_passed_over_and_remembered() {
    let cfg = debian_cfg(UUID);
    let found = boot(ext4(&[
        File("boot/grub/grub.cfg", &cfg),
        File("boot/vmlinuz-6.1.0-9-amd64", b"nine"),
        File("boot/initrd.img-6.1.0-9-amd64", b"nine"),
        File("boot/early.cpio", b"early"),
    ]))
    .unwrap();
    assert_eq!(found.kernel, b"nine");

    let seen = boot(ext4(&[File("boot/grub/grub.cfg", &cfg)])).unwrap_err();
    assert_eq!(seen.id(), "arch.no-bootable-system");
    let entry = seen.find("arch.boot-entry-unusable").unwrap();
    assert!(
        entry
            .text()
            .contains("there is no /boot/vmlinuz-6.1.0-18-amd64"),
        "{entry}"
    );
}

#[test]
fn what_is_not_bootable_is_said_for_each_partition() {
    for (image, named) in [
        (vec![0; 4096], "too small"),
        (vec![0; 1 << 20], "no ext2/3/4 superblock"),
        (Vec::new(), "no ext2/3/4 superblock"),
        (vec![7; 700], "no ext2/3/4 superblock"),
    ] {
        let seen = boot(image).unwrap_err();
        assert_eq!(seen.id(), "arch.no-bootable-system");
        let part = seen.find("arch.partition-unusable").unwrap();
        assert!(
            part.text().contains(named) || part.text().contains("no ext2/3/4"),
            "{part}"
        );
    }
    let mut xfs = vec![0; 1 << 20];
    put(&mut xfs, 0, b"XFSB");
    let seen = boot(gpt(&[xfs, ext4(&[])], 512)).unwrap_err();
    assert!(
        seen.text().contains("nothing to boot on partition 3"),
        "{seen}"
    );
    assert!(
        seen.causes()
            .iter()
            .any(|cause| cause.text().contains("it is XFS"))
    );
}

#[test]
fn loops_of_links_end() {
    let seen = boot(ext4(&[
        Link("vmlinuz", "a"),
        Link("a", "vmlinuz"),
        Link("boot", "boot/boot"),
    ]))
    .unwrap_err();
    assert_eq!(seen.id(), "arch.no-bootable-system");
}

/// A disk whose store fails from some offset on.
struct Failing(Bytes, u64);

impl ReadAt for Failing {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        if offset + data.len() as u64 > self.1 {
            let error = std::io::Error::from_raw_os_error(5);
            return Err(OsCallFailed::new("pread", "disk.raw", &error).into());
        }
        self.0.read_at(offset, data)
    }
}

#[test]
fn a_failing_store_is_the_cause() {
    let image = ext4(&[File("vmlinuz", &[1; 300_000]), File("initrd.img", b"x")]);
    let size = image.len() as u64;
    let image = Arc::new(image);
    for from in [0, 512, 2048, 5000, 64 << 10, size / 2] {
        let disk = Failing(Bytes(Arc::clone(&image)), from);
        match find(Box::new(disk)) {
            Ok(found) => assert_eq!(found.kernel.len(), 300_000),
            Err(seen) => {
                let os = seen
                    .find("os.call-failed")
                    .unwrap_or_else(|| panic!("{from}: {seen:?}"));
                assert_eq!(os.datum("object").unwrap(), "disk.raw");
            }
        }
    }
}

/// A disk that takes its time, then panics.
struct Slow(Mutex<u32>);

impl ReadAt for Slow {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> Result<()> {
        let mut left = self.0.lock().unwrap();
        assert!(*left > 0, "a defect in a reader");
        *left -= 1;
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    }
}

#[test]
fn a_search_that_does_not_end_is_given_up() {
    let started = Instant::now();
    let seen = find_within(Box::new(Slow(Mutex::new(100))), Duration::from_millis(50));
    let seen = seen.unwrap_err();
    assert!(seen.find("arch.disk-search-ended").is_some(), "{seen:?}");
    assert!(started.elapsed() < Duration::from_secs(2));

    let seen = find_within(Box::new(Slow(Mutex::new(0))), Duration::from_secs(5)).unwrap_err();
    assert!(seen.text().contains("panic"), "{seen}");
}

/// A small disk with everything on it, and with a journal that has to be replayed.
static WHOLE: LazyLock<Arc<Vec<u8>>> = LazyLock::new(|| {
    let cfg = debian_cfg(UUID);
    let mut root = ext4(&[
        File("boot/grub/grub.cfg", &cfg),
        File("boot/vmlinuz-6.1.0-18-amd64", b"kernel 18"),
        File("boot/initrd.img-6.1.0-18-amd64", &[9; 20_000]),
        File(
            "boot/loader/entries/x.conf",
            b"linux /vmlinuz\ninitrd /boot/initrd.img-6.1.0-18-amd64\noptions x\n",
        ),
        Link("vmlinuz", "boot/vmlinuz-6.1.0-18-amd64"),
    ]);
    // The feature "needs recovery"; without metadata checksums, so that damage goes deeper.
    root[1024 + 0x60] |= 4;
    let read_only = u32::from_le_bytes(root[1024 + 0x64..][..4].try_into().unwrap());
    put(&mut root, 1024 + 0x64, &(read_only & !0x410).to_le_bytes());
    Arc::new(gpt(&[root], 512))
});

/// A disk with some bytes changed, without a copy of all of it.
struct Damaged {
    base: Arc<Vec<u8>>,
    size: u64,
    changes: Vec<(u64, u8)>,
}

impl ReadAt for Damaged {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        Bytes(Arc::clone(&self.base)).read_at(offset, data)?;
        for (at, value) in &self.changes {
            let index = at
                .checked_sub(offset)
                .and_then(|at| usize::try_from(at).ok());
            if let Some(byte) = index.and_then(|index| data.get_mut(index)) {
                *byte ^= value;
            }
        }
        Ok(())
    }
}

#[test]
fn a_file_system_that_was_not_unmounted_is_read() {
    let disk = Bytes(Arc::clone(&WHOLE));
    let found = find(Box::new(disk)).unwrap();
    assert_eq!(found.initrd.unwrap(), [9; 20_000]);

    // The same with checksums everywhere.
    let mut root = ext4(&[File("vmlinuz", b"kernel")]);
    root[1024 + 0x60] |= 4;
    let sum = volume::crc32c(&root[1024..1024 + 0x3fc]);
    put(&mut root, 1024 + 0x3fc, &sum.to_le_bytes());
    assert_eq!(boot(root.clone()).unwrap().kernel, b"kernel");
    put(&mut root, 1024 + 0x3fc, &(sum ^ 1).to_le_bytes());
    boot(root).unwrap_err();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is damaged, the search ends in time with an answer. Most of the changes hit
    /// structures: partition table, superblock, group descriptors, inodes, directories.
    #[test]
    fn damage_is_harmless(
        places in prop::collection::vec(
            (
                prop_oneof![
                    0_u64..2048,
                    0x11_0400_u64..0x11_0800,
                    0x11_0000_u64..0x11_8000,
                    0x11_0000_u64..0x19_0000,
                ],
                prop_oneof![any::<u8>(), Just(0xff_u8), Just(0x80), Just(1)],
            ),
            0..12,
        ),
        cut in prop::option::of(0_u64..9_000_000),
    ) {
        let size = WHOLE.len() as u64;
        let disk = Damaged {
            base: Arc::clone(&WHOLE),
            size: cut.unwrap_or(size).min(size),
            changes: places,
        };
        let started = Instant::now();
        match find_within(Box::new(disk), Duration::from_secs(8)) {
            Ok(_) => {}
            Err(seen) => prop_assert_eq!(seen.id(), "arch.no-bootable-system", "{:?}", seen),
        }
        prop_assert!(started.elapsed() < Duration::from_secs(8));
    }

    #[test]
    fn arbitrary_bytes_are_harmless(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
        prop_assert!(boot(bytes).is_err());
    }
}

#[test]
fn sizes_by_which_the_reader_would_allocate_are_checked_first() {
    let good = ext4(&[File("vmlinuz", b"kernel")]);
    let word = |at: usize| u32::from_le_bytes(good[at..at + 4].try_into().unwrap());
    let blocks = word(1024 + 4);
    // The journal's inode, by the first group's table of inodes.
    let shift = word(1024 + 0x18);
    let block = 1024_usize << shift;
    let group = if shift == 0 { 2048 } else { block };
    let inode_size = (word(1024 + 0x58) & 0xffff) as usize;
    let journal = word(group + 8) as usize * block + 7 * inode_size;
    for (at, value, named) in [
        (1024 + 0x18, 20, "block size"),
        (1024 + 4, blocks + 1, "larger than its partition"),
        (1024 + 0x150, 1 << 20, "larger than its partition"),
        (journal + 0x6c, 1 << 20, "journal is implausibly large"),
        (1024 + 0xe0, 12, "journal is at an unusual place"),
    ] {
        let mut bad = good.clone();
        bad[1024 + 0x60] |= 4;
        put(&mut bad, at, &value.to_le_bytes());
        let seen = boot(bad).unwrap_err();
        let part = seen.find("arch.partition-unusable").unwrap();
        assert!(part.text().contains(named), "{named}: {part}");
    }
    // Groups of one block each, on a disk that claims to be large but is not there.
    struct Sparse(Vec<u8>);
    impl ReadAt for Sparse {
        fn size(&self) -> u64 {
            1 << 50
        }
        fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<()> {
            data.fill(0);
            let from = usize::try_from(offset).unwrap_or(usize::MAX);
            if let Some(bytes) = self.0.get(from..) {
                let count = bytes.len().min(data.len());
                data[..count].copy_from_slice(&bytes[..count]);
            }
            Ok(())
        }
    }
    let mut bad = good;
    put(&mut bad, 1024 + 4, &u32::MAX.to_le_bytes());
    put(&mut bad, 1024 + 0x20, &8_u32.to_le_bytes());
    let seen = find(Box::new(Sparse(bad))).unwrap_err();
    let part = seen.find("arch.partition-unusable").unwrap();
    assert!(part.text().contains("too many block groups"), "{part}");
}
