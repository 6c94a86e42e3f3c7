//! Guests of a few bytes, in real mode at address 0x1000. They need `/dev/kvm` and are skipped
//! without it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use strake_memory::{GuestRam, create_memfd};
use strake_observe::Kind;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::{DoorbellWidth, EventFd, Exit, Kvm, Vcpu, Vm};

const SIZE: u64 = 4 << 20;
const CODE: u64 = 0x1000;

fn guest(code: &[u8]) -> Option<(Vm, Vcpu, GuestRam)> {
    let Ok(kvm) = Kvm::open() else {
        eprintln!("skipped: no usable /dev/kvm");
        return None;
    };
    let ram = GuestRam::map(create_memfd("test", SIZE).unwrap(), SIZE).unwrap();
    ram.ram()
        .memory()
        .write_slice(code, GuestAddress(CODE))
        .unwrap();
    let vm = Vm::new(&kvm, &ram).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    vcpu.set_msrs([(0x1a0, 1), (0x2ff, 0xc06)]).unwrap();
    vcpu.set_reset_state().unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.regs().unwrap();
    regs.rip = CODE;
    regs.rsp = 0x8000;
    regs.rflags = 2;
    vcpu.set_regs(&regs).unwrap();
    vcpu.adopt();
    Some((vm, vcpu, ram))
}

#[test]
fn ports_are_written_and_read() {
    // mov dx,0x3f8; mov al,'S'; out dx,al; in al,dx; mov [0x2000],al; out 0x80,al
    let code = [
        0xba, 0xf8, 0x03, 0xb0, b'S', 0xee, 0xec, 0xa2, 0x00, 0x20, 0xe6, 0x80, 0xf4,
    ];
    let Some((_vm, mut vcpu, ram)) = guest(&code) else {
        return;
    };
    match vcpu.run() {
        Exit::PortOut(out) => {
            assert_eq!((out.port, out.width, out.data), (0x3f8, 1, &b"S"[..]));
        }
        other => panic!("{other:?}"),
    }
    match vcpu.run() {
        Exit::PortIn(input) => {
            assert_eq!(input.port, 0x3f8);
            input.data[0] = b'T';
        }
        other => panic!("{other:?}"),
    }
    match vcpu.run() {
        Exit::PortOut(out) => assert_eq!((out.port, out.data), (0x80, &b"T"[..])),
        other => panic!("{other:?}"),
    }
    let found: u8 = ram.ram().memory().read_obj(GuestAddress(0x2000)).unwrap();
    assert_eq!(found, b'T');
}

#[test]
fn repeated_port_writes_keep_their_width() {
    // mov si,0x2000; mov cx,3; mov dx,0x1000; cld; rep outsw
    let code = [
        0xbe, 0x00, 0x20, 0xb9, 0x03, 0x00, 0xba, 0x00, 0x10, 0xfc, 0xf3, 0x6f, 0xf4,
    ];
    let Some((_vm, mut vcpu, ram)) = guest(&code) else {
        return;
    };
    ram.ram()
        .memory()
        .write_slice(b"aabbcc", GuestAddress(0x2000))
        .unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        match vcpu.run() {
            Exit::PortOut(out) => {
                assert_eq!((out.port, out.width), (0x1000, 2));
                seen.extend(out.accesses().map(<[u8]>::to_vec));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, [b"aa", b"bb", b"cc"]);
}

#[test]
fn a_doorbell_signals_without_an_exit() {
    // 32-bit addresses reach 0x1000_0000: mov ebx,0x10000000; mov dword [ebx],7 needs a flat
    // segment, so the base of ds is set to it instead: mov [0],ax; out 0x80,al
    let code = [0xb8, 0x07, 0x00, 0xa3, 0x00, 0x00, 0xe6, 0x80, 0xf4];
    let Some((vm, mut vcpu, _ram)) = guest(&code) else {
        return;
    };
    let mut sregs = vcpu.sregs().unwrap();
    sregs.ds.base = 0x1000_0000;
    vcpu.set_sregs(&sregs).unwrap();
    let event = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    vm.attach_doorbell(0x1000_0000, DoorbellWidth::Any, &event)
        .unwrap();
    match vcpu.run() {
        Exit::PortOut(out) => assert_eq!(out.port, 0x80),
        other => panic!("{other:?}"),
    }
    assert_eq!(event.read().unwrap(), 1);
    vm.detach_doorbell(0x1000_0000, DoorbellWidth::Any, &event)
        .unwrap();
    assert!(
        vm.detach_doorbell(0x1000_0000, DoorbellWidth::Any, &event)
            .is_err()
    );
}

#[test]
fn mmio_without_a_doorbell_exits() {
    // mov ax,7; mov [0],ax; mov ax,[0]
    let code = [
        0xb8, 0x07, 0x00, 0xa3, 0x00, 0x00, 0xa1, 0x00, 0x00, 0xe6, 0x80, 0xf4,
    ];
    let Some((_vm, mut vcpu, _ram)) = guest(&code) else {
        return;
    };
    let mut sregs = vcpu.sregs().unwrap();
    sregs.ds.base = 0x1000_0000;
    vcpu.set_sregs(&sregs).unwrap();
    match vcpu.run() {
        Exit::MmioWrite { address, data } => {
            assert_eq!((address, data), (0x1000_0000, &[7, 0][..]));
        }
        other => panic!("{other:?}"),
    }
    match vcpu.run() {
        Exit::MmioRead { address, data } => {
            assert_eq!(address, 0x1000_0000);
            data.copy_from_slice(&[9, 0]);
        }
        other => panic!("{other:?}"),
    }
    match vcpu.run() {
        Exit::PortOut(out) => assert_eq!(out.data, [9]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_triple_fault_is_told() {
    // An empty interrupt table and an undefined instruction.
    let Some((_vm, mut vcpu, _ram)) = guest(&[0x0f, 0x0b]) else {
        return;
    };
    let mut sregs = vcpu.sregs().unwrap();
    sregs.idt.limit = 0;
    sregs.cr0 |= 1; // protected mode: real mode's interrupts are emulated without a limit
    vcpu.set_sregs(&sregs).unwrap();
    match vcpu.run() {
        Exit::TripleFault => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_kick_before_the_run_ends_it() {
    let Some((_vm, mut vcpu, _ram)) = guest(&[0xeb, 0xfe]) else {
        return;
    };
    vcpu.kicker().kick().unwrap();
    assert!(matches!(vcpu.run(), Exit::Interrupted));
}

#[test]
fn every_kick_arrives() {
    // An endless loop: only kicks end it. Each kick asks for one round; a lost one hangs.
    const ROUNDS: usize = 500;
    let Some((_vm, mut vcpu, _ram)) = guest(&[0xeb, 0xfe]) else {
        return;
    };
    let kicker = vcpu.kicker();
    let asked = Arc::new(AtomicBool::new(false));
    let (done, rounds) = mpsc::channel();
    let thread = {
        let asked = Arc::clone(&asked);
        std::thread::spawn(move || {
            vcpu.adopt();
            let mut count = 0;
            while count < ROUNDS {
                assert!(matches!(vcpu.run(), Exit::Interrupted));
                vcpu.acknowledge_kick();
                if asked.swap(false, Ordering::SeqCst) {
                    count += 1;
                    done.send(()).unwrap();
                }
            }
        })
    };
    for _ in 0..ROUNDS {
        asked.store(true, Ordering::SeqCst);
        kicker.kick().unwrap();
        rounds.recv_timeout(Duration::from_secs(10)).unwrap();
    }
    thread.join().unwrap();
    // The vCPU is gone: a kick is void.
    kicker.kick().unwrap();
}

#[test]
fn msi_vectors_route_mask_and_return() {
    let Some((vm, _vcpu, _ram)) = guest(&[0xf4]) else {
        return;
    };
    let first = vm.create_msi().unwrap();
    let second = vm.create_msi().unwrap();
    first.route(0xfee0_0000, 0x41).unwrap();
    first.unmask().unwrap();
    first.unmask().unwrap();
    second.route(0xfee0_0000, 0x42).unwrap();
    second.unmask().unwrap();
    first.mask().unwrap();
    // Masked: what is signalled stays in the eventfd.
    first.event().write(1).unwrap();
    assert_eq!(first.event().read().unwrap(), 1);
    drop(first);
    let third = vm.create_msi().unwrap();
    third.route(0xfee0_0000, 0x43).unwrap();
    third.unmask().unwrap();
}

#[test]
fn a_masked_interrupt_is_sent_when_unmasked() {
    let Some((vm, _vcpu, _ram)) = guest(&[0xf4]) else {
        return;
    };
    let vector = vm.create_msi().unwrap();
    vector.route(0xfee0_0000, 0x41).unwrap();
    vector.event().write(1).unwrap();
    vector.unmask().unwrap();
    // KVM took it.
    for _ in 0..100 {
        if vector.event().read().is_err() {
            return;
        }
        vector.event().write(1).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the interrupt stayed in the eventfd");
}

#[test]
fn legacy_lines_survive_a_new_routing_table() {
    // sti; hlt; out 0x80 after the interrupt: line 4 is sent by the 8259, vector 8+4, to 0x1100.
    let mut code = vec![0u8; 0x140];
    let main: &[u8] = &[
        0xb0, 0x11, 0xe6, 0x20, // ICW1
        0xb0, 0x08, 0xe6, 0x21, // ICW2: vectors from 8
        0xb0, 0x04, 0xe6, 0x21, // ICW3
        0xb0, 0x01, 0xe6, 0x21, // ICW4
        0xb0, 0xef, 0xe6, 0x21, // mask all but line 4
        0xe6, 0x81, // out 0x81: ready
        0xfb, 0xf4, 0xeb, 0xfd, // sti; hlt; jmp to hlt
    ];
    code[..main.len()].copy_from_slice(main);
    code[0x100..0x102].copy_from_slice(&[0xe6, 0x80]);
    let Some((vm, mut vcpu, ram)) = guest(&code) else {
        return;
    };
    let memory = ram.ram().memory();
    memory.write_obj(0x1100u16, GuestAddress(12 * 4)).unwrap();
    memory.write_obj(0u16, GuestAddress(12 * 4 + 2)).unwrap();
    let vector = vm.create_msi().unwrap();
    vector.route(0xfee0_0000, 0x41).unwrap();
    let line = vm.legacy_irq(4).unwrap();
    loop {
        match vcpu.run() {
            Exit::PortOut(out) if out.port == 0x81 => break,
            Exit::PortOut(_) => {}
            other => panic!("{other:?}"),
        }
    }
    line.raise();
    match vcpu.run() {
        Exit::PortOut(out) => assert_eq!(out.port, 0x80),
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_file_is_not_kvm() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let seen = Kvm::from_fd(file.into()).unwrap_err();
    assert_eq!(seen.id(), crate::observations::Unusable::ID);
}
