//! Devices that are saved in one machine and go on in another with the same guest memory.
#![allow(clippy::cast_possible_truncation)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use strake_block::{Access, LiveDisk, RawImage};
use strake_observe::Kind;
use strake_state::corpus::{self, Sample};
use strake_state::observations::ShapeDiffers;
use strake_state::{Blob, Records};
use vm_memory::{Bytes, GuestAddress};

use crate::acpi_pm::{AcpiPm, PowerEvents, SavedAcpiPm};
use crate::bus::BusDevice;
use crate::cmos::{Cmos, SavedCmos};
use crate::console_hub::{ConsoleHub, SavedConsoleHub};
use crate::i8042::{I8042, SavedI8042};
use crate::interrupt::IrqLine;
use crate::lifecycle::{Component, Phase};
use crate::pci::{SavedHostBridge, SavedPciRoot, SavedVector};
use crate::serial::{ConsoleInput, ConsoleOutput, SavedSerial, Serial};
use crate::testing::{Driver, Host, NEEDS_RESET, Piece, eventually};
use crate::virtio::blk::{BlkConfig, SavedBlk, VirtioBlk};
use crate::virtio::console::{SavedConsole, VirtioConsole};
use crate::virtio::net::SavedNet;
use crate::virtio::rng::{SavedRng, VirtioRng};
use crate::virtio::{SavedQueue, SavedVirtioPci, VirtioDevice, VirtioPci};

const DATA: u64 = 0x30_0000;

/// As a machine does it: through bytes, and nothing may be left over.
fn carry(from: &[&dyn Component], to: &[&dyn Component]) -> strake_observe::Result<()> {
    let mut sketch = Records::default();
    for component in from {
        component.sketch(&mut sketch)?;
    }
    for component in to {
        component.prepare(&mut sketch)?;
        assert_eq!(component.phase(), Phase::Prepared, "{}", component.name());
    }
    sketch.finish()?;
    let mut records = Records::default();
    for component in from {
        component.save(&mut records)?;
    }
    let mut records = Records::decode(&records.encode())?;
    for component in to {
        component.restore(&mut records)?;
        assert_eq!(component.phase(), Phase::Quiesced, "{}", component.name());
    }
    records.finish()
}

/// A machine with the same guest memory, and the device in it as it was.
struct Moved<D: VirtioDevice> {
    host: Host,
    function: Arc<VirtioPci<D>>,
}

impl<D: VirtioDevice> Moved<D> {
    fn resume(&self) {
        self.host.pci.start().unwrap();
        self.host.pci.quiesce().unwrap();
        self.host.pci.resume().unwrap();
        self.function.resume().unwrap();
    }
}

fn prepared<D: VirtioDevice>(old: &Host, slot: u8, device: D) -> Moved<D> {
    let host = Host {
        ram: old.ram.clone(),
        ..Host::default()
    };
    let function =
        VirtioPci::new(device, host.ram.clone(), &*host.msi, host.bells.clone()).unwrap();
    host.pci.add(slot, function.clone()).unwrap();
    Moved { host, function }
}

/// The driver, which notices nothing, with the other machine's lines to look at.
fn same_driver<'h>(driver: Driver<'_>, host: &'h Host) -> Driver<'h> {
    let lines = host.msi.0.lock().unwrap().clone();
    Driver {
        host,
        lines,
        slot: driver.slot,
        common: driver.common,
        isr: driver.isr,
        device: driver.device,
        notify: driver.notify,
        notify_step: driver.notify_step,
        table: driver.table,
        pending: driver.pending,
        msix: driver.msix,
        pci_access: driver.pci_access,
        features: driver.features,
        rings: driver.rings,
    }
}

fn image(file: &tempfile::NamedTempFile) -> Arc<LiveDisk> {
    let open = std::fs::File::options()
        .read(true)
        .write(true)
        .open(file.path())
        .unwrap();
    let raw = RawImage::from_fd(open.into(), "disk.raw", Access::ReadWrite).unwrap();
    LiveDisk::new("root", Arc::new(raw))
}

fn blk(file: &tempfile::NamedTempFile, queues: u16, serial: &str) -> VirtioBlk {
    let config = BlkConfig {
        queues,
        serial: serial.into(),
        read_only: false,
    };
    VirtioBlk::new("blk-root", image(file), &config).unwrap()
}

fn disk_file(sectors: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(sectors * 512).unwrap();
    file
}

/// Writes a sector filled with `byte` and waits for it.
fn write_sector(driver: &mut Driver<'_>, sector: u64, byte: u8) {
    let memory = driver.host.memory();
    let mut header = [0; 16];
    header[0] = 1;
    header[8..].copy_from_slice(&sector.to_le_bytes());
    memory.write_slice(&header, GuestAddress(DATA)).unwrap();
    memory
        .write_slice(&[byte; 512], GuestAddress(DATA + 512))
        .unwrap();
    memory
        .write_slice(&[0xee], GuestAddress(DATA + 2048))
        .unwrap();
    let pieces = [
        Piece::readable(DATA, 16),
        Piece::readable(DATA + 512, 512),
        Piece::writable(DATA + 2048, 1),
    ];
    let head = driver.submit(0, &pieces);
    assert_eq!(driver.complete(0).0, head);
    let status: u8 = memory.read_obj(GuestAddress(DATA + 2048)).unwrap();
    assert_eq!(status, 0);
}

#[test]
fn a_disk_goes_on_where_it_was_and_again() {
    let file = disk_file(1024);
    let first = Host::default();
    let (function, lines) = first.add(3, blk(&file, 2, "one"));
    let mut driver = Driver::probe(&first, 3, lines);
    driver.bring_up(u64::MAX, 64);
    driver.put8(driver.device + 32, 0); // the guest turns the write cache off
    for sector in 0..100 {
        write_sector(&mut driver, sector, sector as u8);
    }
    function.quiesce().unwrap();

    let moved = prepared(&first, 3, blk(&file, 2, "one"));
    carry(&[&*function], &[&*moved.function]).unwrap();
    moved.resume();
    let mut driver = same_driver(driver, &moved.host);
    assert!(
        driver.lines[0].raised() > 0,
        "an interrupt may have been lost"
    );
    assert_eq!(driver.get8(driver.device + 32), 0, "the cache stays off");
    assert_eq!(
        *driver.lines[0].routes.lock().unwrap(),
        [(0xfee0_0000, 0x40)]
    );
    for sector in 100..200 {
        write_sector(&mut driver, sector, sector as u8);
    }
    let written = std::fs::read(file.path()).unwrap();
    for sector in 0..200 {
        assert_eq!(written[sector * 512], sector as u8);
    }
    // The new one is saved like the old one was.
    moved.function.quiesce().unwrap();
    let third = prepared(&first, 3, blk(&file, 2, "one"));
    carry(&[&*moved.function], &[&*third.function]).unwrap();
    third.resume();
    let driver = same_driver(driver, &third.host);
    driver.reset();
    assert_eq!(driver.status(), 0);
}

#[test]
fn what_was_made_available_during_the_move_is_served() {
    let file = disk_file(64);
    let first = Host::default();
    let (function, lines) = first.add(3, blk(&file, 1, ""));
    let mut driver = Driver::probe(&first, 3, lines);
    driver.bring_up(u64::MAX, 16);
    function.quiesce().unwrap();
    let header = [0; 16];
    let memory = first.memory();
    memory.write_slice(&header, GuestAddress(DATA)).unwrap();
    let pieces = [
        Piece::readable(DATA, 16),
        Piece::writable(DATA + 512, 512),
        Piece::writable(DATA + 2048, 1),
    ];
    let head = driver.rings[0].add(&pieces); // nobody is kicked
    let moved = prepared(&first, 3, blk(&file, 1, ""));
    carry(&[&*function], &[&*moved.function]).unwrap();
    moved.resume();
    let mut driver = same_driver(driver, &moved.host);
    assert_eq!(driver.complete(0).0, head);
}

#[test]
fn a_device_that_waits_for_its_reset_still_does() {
    let file = disk_file(64);
    let first = Host::default();
    let (function, lines) = first.add(3, blk(&file, 1, ""));
    let mut driver = Driver::probe(&first, 3, lines);
    driver.bring_up(u64::MAX, 16);
    driver.submit(0, &[Piece::readable(u64::MAX - 8, 16)]);
    driver.expect_needs_reset();
    function.quiesce().unwrap();
    let moved = prepared(&first, 3, blk(&file, 1, ""));
    carry(&[&*function], &[&*moved.function]).unwrap();
    moved.resume();
    let mut driver = same_driver(driver, &moved.host);
    assert!(driver.status() & NEEDS_RESET != 0);
    driver.bring_up(u64::MAX, 16);
    write_sector(&mut driver, 3, 3);
}

#[test]
fn another_shape_is_refused_by_name() {
    let file = disk_file(64);
    let first = Host::default();
    let (function, _) = first.add(3, blk(&file, 2, "one"));
    function.quiesce().unwrap();
    let larger = disk_file(128);
    for (device, what) in [
        (blk(&file, 1, "one"), "sizes"),
        (blk(&larger, 2, "one"), "sectors"),
        (blk(&file, 2, "two"), "serial"),
    ] {
        let moved = prepared(&first, 3, device);
        let seen = carry(&[&*function], &[&*moved.function]).expect_err(what);
        assert!(seen.find(ShapeDiffers::ID).is_some(), "{seen}");
        assert!(seen.to_string().contains("blk-root"), "{seen}");
    }
    let moved = prepared(&first, 3, VirtioRng::new("blk-root"));
    assert!(carry(&[&*function], &[&*moved.function]).is_err());
}

#[test]
fn typed_input_arrives_after_the_move() {
    let hub = Arc::new(Sink::default());
    let first = Host::default();
    let console = VirtioConsole::new("hvc", hub.clone()).unwrap();
    let input = console.input();
    let (function, lines) = first.add(4, console);
    let mut driver = Driver::probe(&first, 4, lines);
    driver.bring_up(u64::MAX, 16);
    assert_eq!(input.offer(b"typed"), 5);
    function.quiesce().unwrap();
    let moved = prepared(&first, 4, VirtioConsole::new("hvc", hub).unwrap());
    carry(&[&*function], &[&*moved.function]).unwrap();
    moved.resume();
    let mut driver = same_driver(driver, &moved.host);
    let memory = moved.host.memory();
    let head = driver.submit(0, &[Piece::writable(DATA, 64)]);
    assert_eq!(driver.complete(0), (head, 5));
    let mut got = [0; 5];
    memory.read_slice(&mut got, GuestAddress(DATA)).unwrap();
    assert_eq!(&got, b"typed");
}

#[derive(Default)]
struct Sink {
    output: Mutex<Vec<u8>>,
    raised: std::sync::atomic::AtomicU32,
}

impl ConsoleOutput for Sink {
    fn write(&self, bytes: &[u8]) {
        self.output.lock().unwrap().extend(bytes);
    }
}

impl IrqLine for Sink {
    fn raise(&self) {
        self.raised
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

impl PowerEvents for Sink {
    fn power_off(&self) {}
    fn reset(&self) {}
}

fn quiesced<C: Component>(component: Arc<C>) -> Arc<C> {
    component.start().unwrap();
    component.quiesce().unwrap();
    component
}

#[test]
fn the_platforms_registers_move() {
    let sink = Arc::new(Sink::default());
    let serial = Serial::new("serial", sink.clone(), sink.clone());
    serial.write(1, &[1]); // interrupt on received data
    serial.write(7, &[0x5a]); // scratch
    let typed: Vec<u8> = (0..200).collect();
    assert_eq!(serial.offer(&typed), 200);
    let power = AcpiPm::new(sink.clone(), sink.clone());
    power.event_block().write(2, &[0, 1]);
    power.press_power_button();
    let clock = Cmos::new();
    clock.write(0, &[0x40]);
    clock.write(1, &[7]);
    let keyboard = I8042::new(sink.clone());
    let old = (
        quiesced(serial),
        quiesced(power),
        quiesced(clock),
        quiesced(keyboard),
    );

    let sink = Arc::new(Sink::default());
    let serial = Serial::new("serial", sink.clone(), sink.clone());
    let power = AcpiPm::new(sink.clone(), sink.clone());
    let clock = Cmos::new();
    let keyboard = I8042::new(sink.clone());
    carry(
        &[&*old.0, &*old.1, &*old.2, &*old.3],
        &[&*serial, &*power, &*clock, &*keyboard],
    )
    .unwrap();
    let raised = sink.raised.load(std::sync::atomic::Ordering::Relaxed);
    assert!(raised >= 2, "both pending interrupts are raised again");
    let read = |device: &dyn BusDevice, offset: u64| {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    };
    assert_eq!(read(&*serial, 7), 0x5a);
    let mut got = Vec::new();
    while read(&*serial, 5) & 1 != 0 {
        got.push(read(&*serial, 0));
    }
    assert_eq!(got, typed);
    assert_eq!(
        read(&*power.event_block(), 1),
        1,
        "the press is still there"
    );
    assert_eq!(read(&*clock, 1), 7);
}

#[test]
fn terminals_move_with_what_they_typed_and_nothing_is_read_before_its_time() {
    struct Slow(Mutex<Vec<u8>>, usize);
    impl ConsoleInput for Slow {
        fn offer(&self, bytes: &[u8]) -> usize {
            let mut got = self.0.lock().unwrap();
            let room = self.1.saturating_sub(got.len()).min(bytes.len());
            got.extend(&bytes[..room]);
            room
        }
    }
    let log = tempfile::NamedTempFile::new().unwrap();
    let open = || {
        std::fs::File::options()
            .append(true)
            .open(log.path())
            .unwrap()
    };
    let old = ConsoleHub::new("console", open()).unwrap();
    let little = Arc::new(Slow(Mutex::default(), 2));
    old.connect_input(little.clone());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    old.attach(theirs.into()).unwrap();
    old.start().unwrap();
    old.write(b"before ");
    ours.write_all(b"typed").unwrap();
    eventually(|| little.0.lock().unwrap().len() == 2);
    old.quiesce().unwrap();
    assert_eq!(std::fs::read(log.path()).unwrap(), b"before ");
    ours.write_all(b" late").unwrap();

    let new = ConsoleHub::new("console", open()).unwrap();
    let rest = Arc::new(Slow(Mutex::default(), 100));
    new.connect_input(rest.clone());
    new.bring(old.streams().unwrap());
    carry(&[&*old], &[&*new]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(rest.0.lock().unwrap().is_empty(), "it is not its turn yet");
    new.resume().unwrap();
    old.close();
    new.write(b"after");
    eventually(|| *rest.0.lock().unwrap() == b"ped late");
    let mut seen = [0; 12];
    ours.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"before after");

    // Without the streams that the record speaks of it is refused.
    new.quiesce().unwrap();
    let third = ConsoleHub::new("console", open()).unwrap();
    assert!(carry(&[&*new], &[&*third]).is_err());
    // One that was refused, and one that is only resumed, are as before.
    new.resume().unwrap();
    new.write(b"!");
    let mut seen = [0; 1];
    ours.read_exact(&mut seen).unwrap();
}

#[test]
fn stored_records_of_every_version_are_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let vector = SavedVector {
        raw: [4; 16],
        pending: true,
    };
    let queue = SavedQueue {
        limit: 256,
        size: 128,
        enabled: true,
        descriptors: 0x1000,
        driver: 0x2000,
        device: 0x3000,
        vector: 1,
    };
    corpus::check(
        &folder,
        &[
            Sample::of(SavedAcpiPm {
                status: 0x100,
                enable: 0x120,
            }),
            Sample::of(SavedCmos {
                index: 0x40,
                memory: [7; 128],
            }),
            Sample::of(SavedI8042 {}),
            Sample::of(SavedSerial {
                divisor_low: 1,
                divisor_high: 2,
                interrupt_enable: 3,
                interrupt_identification: 4,
                line_control: 5,
                line_status: 6,
                modem_control: 7,
                modem_status: 8,
                scratch: 9,
                fifo: Blob(vec![10]),
                input: Blob(vec![11, 12]),
            }),
            Sample::of(SavedHostBridge { config: [3; 256] }),
            Sample::of(SavedPciRoot {
                address: 0x8000_1800,
            }),
            Sample::of(SavedConsoleHub {
                waiting: vec![Blob(vec![1]), Blob(Vec::new())],
            }),
            Sample::of(SavedVirtioPci {
                device: 2,
                offered: 0x1_0000_0001,
                config: [1; 256],
                msix_enabled: true,
                msix_masked: false,
                vectors: vec![vector],
                status: 0xf,
                offered_select: 1,
                accepted_select: 1,
                accepted: 0x1_0000_0001,
                queue_select: 2,
                queues: vec![queue],
                config_vector: 3,
                isr: 1,
                generation: 4,
                needs_reset: false,
                driver_ready: true,
            }),
            Sample::of(SavedBlk {
                sectors: 1 << 20,
                serial: [b'r'; 20],
                writeback: true,
            }),
            Sample::of(SavedNet {
                mac: [2, 0, 0, 0, 0, 1],
                down: false,
            }),
            Sample::of(SavedRng {}),
            Sample::of(SavedConsole {
                input: Blob(b"typed".to_vec()),
            }),
        ],
    );
}
