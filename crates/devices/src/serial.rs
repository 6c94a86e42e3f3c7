//! The first serial port: a 16550 whose other end is on the host.
//!
//! Output goes byte by byte to a [`ConsoleOutput`], which must not block: it is called by a vCPU.
//! Input is queued here (64 KiB at most) and moved into the port's FIFO as the guest reads, because
//! the FIFO of the emulated port holds no more than 64 bytes.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strake_observe::Result;
use strake_state::Blob;
use strake_state::observations::Damaged;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial as Uart, SerialState, Trigger};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::lifecycle::{PhaseCell, Registers};

/// Input that waits for the guest to read it. What comes on top of it is refused.
pub const INPUT_LIMIT: usize = 64 * 1024;

/// How many ports it has.
pub const PORTS: u64 = 8;

/// Where a console's output goes.
pub trait ConsoleOutput: Send + Sync {
    /// The guest wrote `bytes`. Must not block: a vCPU or a device's worker calls it.
    fn write(&self, bytes: &[u8]);
}

/// A console that takes input.
pub trait ConsoleInput: Send + Sync {
    /// Offers `bytes`; says how many of them were taken. The rest may be offered again later.
    fn offer(&self, bytes: &[u8]) -> usize;
}

/// A serial port.
pub struct Serial {
    name: String,
    phase: PhaseCell,
    irq: Arc<dyn IrqLine>,
    output: Arc<dyn ConsoleOutput>,
    state: Mutex<State>,
}

struct State {
    uart: Uart<Line, NoEvents, Output>,
    input: VecDeque<u8>,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.raise();
        Ok(())
    }
}

struct Output(Arc<dyn ConsoleOutput>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

crate::registers_only!(Serial);

strake_state::saved! {
    /// The registers of a 16550, and the input that the guest has not read.
    pub record SavedSerial("serial", version 1) {
        /// Divisor latch, low byte.
        1 => divisor_low: u8,
        /// Divisor latch, high byte.
        2 => divisor_high: u8,
        /// Interrupt enable.
        3 => interrupt_enable: u8,
        /// Interrupt identification.
        4 => interrupt_identification: u8,
        /// Line control.
        5 => line_control: u8,
        /// Line status.
        6 => line_status: u8,
        /// Modem control.
        7 => modem_control: u8,
        /// Modem status.
        8 => modem_status: u8,
        /// Scratch.
        9 => scratch: u8,
        /// What is in the FIFO.
        10 => fifo: Blob,
        /// What waits for room in it.
        11 => input: Blob,
    }
}

impl Registers for Serial {
    type Saved = SavedSerial;

    fn registers(&self) -> SavedSerial {
        let state = self.lock();
        let uart = state.uart.state();
        SavedSerial {
            divisor_low: uart.baud_divisor_low,
            divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: Blob(uart.in_buffer),
            input: Blob(state.input.iter().copied().collect()),
        }
    }

    /// The port raises its interrupt again if one is pending.
    fn set_registers(&self, saved: SavedSerial) -> Result<()> {
        let uart = SerialState {
            baud_divisor_low: saved.divisor_low,
            baud_divisor_high: saved.divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.fifo.0,
        };
        let line = Line(Arc::clone(&self.irq));
        let output = Output(Arc::clone(&self.output));
        let uart = Uart::from_state(&uart, line, NoEvents, output).map_err(|_| {
            strake_observe::Observation::from(Damaged {
                record: format!("'serial' of '{}'", self.name),
                reason: "its FIFO holds more than it can".to_owned(),
            })
        })?;
        let mut state = self.lock();
        state.uart = uart;
        state.input = saved.input.0.into_iter().take(INPUT_LIMIT).collect();
        Ok(())
    }
}

impl Serial {
    /// A port that interrupts by `irq` and whose output goes to `output`.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        irq: Arc<dyn IrqLine>,
        output: Arc<dyn ConsoleOutput>,
    ) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            phase: PhaseCell::default(),
            irq: Arc::clone(&irq),
            output: Arc::clone(&output),
            state: Mutex::new(State {
                uart: Uart::new(Line(irq), Output(output)),
                input: VecDeque::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Moves input into the FIFO as far as it has room.
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.input.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.input.iter().take(room).copied().collect();
        // In loopback mode the port takes nothing from outside: it stays in the queue.
        let taken = self.uart.enqueue_raw_bytes(&bytes).unwrap_or(0);
        self.input.drain(..taken.min(room));
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // A wider access than the port's registers reads the first one only, as on an 8-bit bus.
        if let (Ok(register), Some(byte)) = (u8::try_from(offset), data.first_mut()) {
            let mut state = self.lock();
            *byte = state.uart.read(register);
            state.refill();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(register), Some(byte)) = (u8::try_from(offset), data.first()) {
            let mut state = self.lock();
            // Neither our trigger nor our output fails; a FIFO that is full in loopback mode
            // loses the byte, as the hardware's does.
            let _ = state.uart.write(register, *byte);
            state.refill();
        }
    }
}

impl ConsoleInput for Serial {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let taken = bytes
            .len()
            .min(INPUT_LIMIT - state.input.len().min(INPUT_LIMIT));
        state.input.extend(bytes.iter().take(taken));
        state.refill();
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::lifecycle::{Component, Phase};

    #[derive(Default)]
    struct Host {
        irqs: AtomicU32,
        output: Mutex<Vec<u8>>,
    }

    impl IrqLine for Host {
        fn raise(&self) {
            self.irqs.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl ConsoleOutput for Host {
        fn write(&self, bytes: &[u8]) {
            self.output.lock().unwrap().extend(bytes);
        }
    }

    fn register(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_reaches_the_host() {
        let host = Arc::new(Host::default());
        let serial = Serial::new("com1", host.clone(), host.clone());
        for byte in b"hello" {
            serial.write(0, &[*byte]);
        }
        assert_eq!(*host.output.lock().unwrap(), b"hello");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_in_order() {
        let host = Arc::new(Host::default());
        let serial = Serial::new("com1", host.clone(), host.clone());
        serial.write(1, &[1]); // interrupt on received data
        let sent: Vec<u8> = (0..=255).cycle().take(1000).collect();
        assert_eq!(serial.offer(&sent), 1000);
        assert!(host.irqs.load(Ordering::Relaxed) > 0);
        let mut got = Vec::new();
        while register(&serial, 5) & 1 != 0 {
            got.push(register(&serial, 0));
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn input_is_bounded() {
        let host = Arc::new(Host::default());
        let serial = Serial::new("com1", host.clone(), host);
        let much = vec![0; 2 * INPUT_LIMIT];
        assert!(serial.offer(&much) >= INPUT_LIMIT);
        assert!(serial.offer(&much) <= 64);
    }

    #[test]
    fn any_access_is_harmless() {
        let host = Arc::new(Host::default());
        let serial = Serial::new("com1", host.clone(), host);
        for offset in [0, 1, 7, 8, 255, 256, u64::MAX] {
            for len in [0, 1, 2, 4, 8] {
                let mut data = vec![0; len];
                serial.read(offset, &mut data);
                serial.write(offset, &data);
            }
        }
    }

    #[test]
    fn its_life_is_checked() {
        let host = Arc::new(Host::default());
        let serial = Serial::new("com1", host.clone(), host);
        assert!(serial.quiesce().is_err());
        serial.start().unwrap();
        serial.quiesce().unwrap();
        assert_eq!(serial.phase(), Phase::Quiesced);
        assert!(serial.start().is_err());
        serial.resume().unwrap();
    }
}
