use strake_observe::Kind;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use crate::observations::{MemfdRefused, SizeRefused};
use crate::{GuestRam, HIGH_RAM_START, LOW_RAM_END, RAM_MAX, create_memfd};

#[test]
fn small_ram_is_one_slot() {
    let ram = GuestRam::map(create_memfd("t", 64 << 20).unwrap(), 64 << 20).unwrap();
    assert_eq!(ram.slots().len(), 1);
    assert_eq!(ram.slots()[0].gpa, 0);
    assert_eq!(ram.slots()[0].size, 64 << 20);
    let memory = ram.ram().memory();
    assert_eq!(memory.last_addr(), GuestAddress((64 << 20) - 1));
}

#[test]
fn large_ram_leaves_the_hole() {
    let size = LOW_RAM_END + (1 << 30);
    let ram = GuestRam::map(create_memfd("t", size).unwrap(), size).unwrap();
    assert_eq!(ram.slots().len(), 2);
    assert_eq!(ram.slots()[1].gpa, HIGH_RAM_START);
    assert_eq!(ram.slots()[1].offset, LOW_RAM_END);
    assert_eq!(ram.slots()[1].size, 1 << 30);
    let memory = ram.ram().memory();
    memory
        .write_obj(7u64, GuestAddress(HIGH_RAM_START))
        .unwrap();
    assert!(memory.write_obj(7u64, GuestAddress(LOW_RAM_END)).is_err());
}

#[test]
fn memory_outlives_its_mapping() {
    let memfd = create_memfd("t", 2 << 20).unwrap();
    let again = memfd.try_clone().unwrap();
    let ram = GuestRam::map(memfd, 2 << 20).unwrap();
    ram.ram()
        .memory()
        .write_obj(0x1122_3344u32, GuestAddress(4096))
        .unwrap();
    drop(ram);
    let ram = GuestRam::map(again, 2 << 20).unwrap();
    let found: u32 = ram.ram().memory().read_obj(GuestAddress(4096)).unwrap();
    assert_eq!(found, 0x1122_3344);
}

#[test]
fn impossible_sizes_are_refused() {
    for size in [0, 4096, (2 << 20) + 1, RAM_MAX + (2 << 20), u64::MAX] {
        let seen = create_memfd("t", size).unwrap_err();
        assert_eq!(seen.id(), SizeRefused::ID, "{size}");
    }
}

#[test]
fn a_memfd_of_another_size_is_refused() {
    let memfd = create_memfd("t", 4 << 20).unwrap();
    let seen = GuestRam::map(memfd, 8 << 20).unwrap_err();
    assert_eq!(seen.id(), MemfdRefused::ID);
}

#[test]
fn the_size_is_sealed() {
    let memfd = create_memfd("t", 4 << 20).unwrap();
    assert!(rustix::fs::ftruncate(&memfd, 0).is_err());
}
