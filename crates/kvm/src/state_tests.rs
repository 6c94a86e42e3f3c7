//! A guest that goes on in another VM. Needs `/dev/kvm` and is skipped without it.

use std::path::Path;

use strake_memory::{GuestRam, create_memfd};
use strake_state::corpus::{self, Sample};
use strake_state::{Blob, Records};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::{Exit, Kvm, SavedMsr, SavedVcpu, SavedVm, Vcpu, Vm};

const SIZE: u64 = 4 << 20;
const CODE: u64 = 0x1000;

/// mov dx,0x3f8; again: in al,dx; inc cx; mov [0x2000],al; mov [0x2002],cx; out 0x80,al; jmp again
const GUEST: [u8; 16] = [
    0xba, 0xf8, 0x03, 0xec, 0x41, 0xa2, 0x00, 0x20, 0x89, 0x0e, 0x02, 0x20, 0xe6, 0x80, 0xeb, 0xf3,
];

fn vm(kvm: &Kvm, memfd: &std::os::fd::OwnedFd) -> (Vm, Vcpu, GuestRam) {
    let ram = GuestRam::map(memfd.try_clone().unwrap(), SIZE).unwrap();
    let vm = Vm::new(kvm, &ram).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    (vm, vcpu, ram)
}

fn begin(vcpu: &Vcpu, ram: &GuestRam) {
    let memory = ram.ram().memory();
    memory.write_slice(&GUEST, GuestAddress(CODE)).unwrap();
    vcpu.set_reset_state().unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.regs().unwrap();
    (regs.rip, regs.rsp, regs.rflags) = (CODE, 0x8000, 2);
    vcpu.set_regs(&regs).unwrap();
}

/// Runs until the guest reads; answers.
fn feed(vcpu: &mut Vcpu, answer: u8) {
    loop {
        match vcpu.run() {
            Exit::PortIn(input) => {
                input.data[0] = answer;
                return;
            }
            Exit::PortOut(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_guest_goes_on_in_another_vm_where_it_was() {
    let Ok(kvm) = Kvm::open() else {
        eprintln!("skipped: no usable /dev/kvm");
        return;
    };
    let memfd = create_memfd("test", SIZE).unwrap();
    let (old_vm, mut old, ram) = vm(&kvm, &memfd);
    begin(&old, &ram);
    old.adopt();
    for answer in 1..=3 {
        feed(&mut old, answer);
    }
    // The instruction that reads is not finished: its answer is only in the page shared with KVM.
    old.finish_exit();
    assert!(matches!(old.run(), Exit::Interrupted));
    old.acknowledge_kick();
    let mut records = Records::default();
    records.put("vcpu0", &old.save().unwrap()).unwrap();
    records.put("vm", &old_vm.save().unwrap()).unwrap();
    let bytes = records.encode();
    drop((old, old_vm, ram));

    let (new_vm, mut new, ram) = vm(&kvm, &memfd);
    let mut records = Records::decode(&bytes).unwrap();
    let vcpu: SavedVcpu = records.take("vcpu0").unwrap();
    let all: SavedVm = records.take("vm").unwrap();
    records.finish().unwrap();
    new.adopt();
    new.restore(&vcpu).unwrap();
    new_vm.restore(&all).unwrap();
    feed(&mut new, 4);
    let memory = ram.ram().memory();
    let read = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!(
        (read(0x2000), read(0x2002)),
        (3, 3),
        "the third answer arrived, once"
    );
    feed(&mut new, 5);
    assert_eq!((read(0x2000), read(0x2002)), (4, 4));
    let again = new_vm.save().unwrap();
    assert!(again.clock_ns >= all.clock_ns, "the clock never goes back");
    let again = new.save();
    // It stands in front of an unfinished instruction, but what is asked here is whole all the same.
    assert_eq!(again.unwrap().msrs.len(), vcpu.msrs.len());
}

#[test]
fn what_makes_no_sense_is_refused() {
    let Ok(kvm) = Kvm::open() else {
        eprintln!("skipped: no usable /dev/kvm");
        return;
    };
    let memfd = create_memfd("test", SIZE).unwrap();
    let (_vm, vcpu, ram) = vm(&kvm, &memfd);
    begin(&vcpu, &ram);
    let saved = vcpu.save().unwrap();
    type Damage = (&'static str, fn(&mut SavedVcpu));
    let damage: [Damage; 5] = [
        ("registers", |saved| saved.regs.0.truncate(7)),
        ("local APIC", |saved| saved.lapic = Blob(Vec::new())),
        ("extended registers", |saved| {
            saved.xsave = Some(Blob(vec![0; 17]))
        }),
        ("CPU features", |saved| saved.cpuid.0.extend([0; 7])),
        ("model-specific registers", |saved| {
            saved.msrs.push(SavedMsr {
                index: 0xdead_beef,
                value: 1,
            });
        }),
    ];
    for (what, damage) in damage {
        let (_vm, mut other, _ram) = vm(&kvm, &memfd);
        let mut damaged = saved.clone();
        damage(&mut damaged);
        let seen = other.restore(&damaged).expect_err(what);
        assert!(seen.text().contains(what), "{seen}");
    }
}

#[test]
fn stored_records_of_every_version_are_read() {
    let blob = |byte: u8| Blob(vec![byte; 4]);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    corpus::check(
        &folder,
        &[
            Sample::of(SavedVcpu {
                cpuid: blob(1),
                regs: blob(2),
                sregs: blob(3),
                fpu: None,
                xsave: Some(blob(5)),
                xcrs: Some(blob(6)),
                debugregs: Some(blob(7)),
                lapic: blob(8),
                mp_state: Some(blob(9)),
                events: None,
                msrs: vec![SavedMsr {
                    index: 0x174,
                    value: u64::MAX,
                }],
                tsc: 12,
                tsc_khz: 13,
                tsc_offset: Some(14),
                taken_at_ns: 15,
            }),
            Sample::of(SavedVm {
                pic_master: blob(1),
                pic_slave: blob(2),
                ioapic: blob(3),
                pit: blob(4),
                clock_ns: 5,
                taken_at_ns: 6,
            }),
        ],
    );
}
