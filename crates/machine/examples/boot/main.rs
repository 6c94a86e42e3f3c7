//! Boots a guest without a daemon, its console on standard output: for work on the monitor itself.
//! In this process and without a jail, or with `--monitor` in a jailed monitor.
//!
//! ```text
//! boot --kernel vmlinuz [--initrd FILE] [--cmdline TEXT] [--boot-disk] [--disk RAW]... [--tap NAME]
//!      [--virtio-console] [--cpus N] [--memory MIB] [--button-after SECONDS]
//!      [--monitor strake-vmm [--pause-every MS] [--migrate-to RAW] [--type TEXT]]
//! ```
//!
//! With `--migrate-to` the first disk is migrated to a new file, again and again, each time that
//! the guest says `MIGRATE` on its console; `--type` is typed once, when a shell of the guest offers its `help`.
#![allow(unsafe_code)] // Opens a tap device, hands a descriptor to a child.

mod driven;

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use strake_api::control::{
    BootConfig, ConsoleKind, DiskConfig, FdIndex, ImageConfig, MachineConfig, MemoryConfig,
    NicConfig,
};
use strake_machine::{Descriptors, Machine, Mailbox};
use strake_observe::{OsContext, Result, Style, render};

#[derive(Default)]
struct Options {
    kernel: Option<String>,
    initrd: Option<String>,
    cmdline: String,
    boot_disk: bool,
    console: ConsoleKind,
    types: Option<String>,
    disks: Vec<String>,
    taps: Vec<String>,
    cpus: u8,
    memory: u64,
    button_after: Option<u64>,
    monitor: Option<String>,
    pause_every: Option<u64>,
    migrate_to: Option<String>,
}

fn main() {
    let options = options();
    let done = configuration(&options).and_then(|(config, fds)| match &options.monitor {
        Some(monitor) => driven::run(monitor, &options, config, &fds),
        None => run(&options, config, fds),
    });
    if let Err(seen) = done {
        eprint!("{}", render(&seen, Style::Plain));
        std::process::exit(1);
    }
}

fn options() -> Options {
    let mut options = Options {
        cpus: 1,
        memory: 512,
        ..Default::default()
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_default();
        match word.as_str() {
            "--kernel" => options.kernel = Some(value()),
            "--initrd" => options.initrd = Some(value()),
            "--cmdline" => options.cmdline = value(),
            "--boot-disk" => options.boot_disk = true,
            "--virtio-console" => options.console = ConsoleKind::Virtio,
            "--type" => options.types = Some(value()),
            "--disk" => options.disks.push(value()),
            "--tap" => options.taps.push(value()),
            "--cpus" => options.cpus = value().parse().unwrap_or(1),
            "--memory" => options.memory = value().parse().unwrap_or(512),
            "--monitor" => options.monitor = Some(value()),
            "--pause-every" => options.pause_every = value().parse().ok(),
            "--migrate-to" => options.migrate_to = Some(value()),
            "--button-after" => options.button_after = value().parse().ok(),
            other => {
                eprintln!("unknown argument '{other}'");
                std::process::exit(2);
            }
        }
    }
    options
}

/// What the daemon would send, and the descriptors for it.
fn configuration(options: &Options) -> Result<(MachineConfig, Vec<OwnedFd>)> {
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut give = |fd: OwnedFd| {
        fds.push(fd);
        FdIndex(u8::try_from(fds.len() - 1).unwrap_or(u8::MAX))
    };
    let size = options.memory << 20;
    let config = MachineConfig {
        vm: "boot".to_owned(),
        cpus: options.cpus,
        kvm: give(open("/dev/kvm")?),
        memory: MemoryConfig {
            size,
            memfd: give(strake_memory::create_memfd("boot", size)?),
        },
        boot: match &options.kernel {
            Some(kernel) if !options.boot_disk => BootConfig::Kernel {
                kernel: give(read(kernel)?),
                kernel_path: kernel.clone(),
                initrd: options
                    .initrd
                    .as_ref()
                    .map(|path| read(path))
                    .transpose()?
                    .map(&mut give),
                cmdline: options.cmdline.clone(),
            },
            _ => BootConfig::Disk {
                disk: "disk0".to_owned(),
                cmdline_append: options.cmdline.clone(),
            },
        },
        disks: options
            .disks
            .iter()
            .zip(0u8..)
            .map(|(path, index)| {
                Ok(DiskConfig {
                    name: format!("disk{index}"),
                    slot: 1 + index,
                    image: ImageConfig::Raw {
                        file: give(open(path)?),
                        path: path.clone(),
                    },
                    read_only: false,
                    serial: format!("disk{index}"),
                    queues: options.cpus.into(),
                    limits: strake_api::control::DiskLimits::default(),
                })
            })
            .collect::<Result<_>>()?,
        nics: options
            .taps
            .iter()
            .zip(0u8..)
            .map(|(name, index)| {
                Ok(NicConfig {
                    name: format!("net{index}"),
                    slot: 16 + index,
                    tap: give(tap(name)?),
                    mac: [0x52, 0x54, 0, 0, 0, index],
                })
            })
            .collect::<Result<_>>()?,
        console: options.console,
        console_log: give(
            std::io::stdout()
                .as_fd()
                .try_clone_to_owned()
                .os("dup", "standard output")?,
        ),
        observations: None,
    };
    Ok((config, fds))
}

/// In this process.
fn run(options: &Options, config: MachineConfig, fds: Vec<OwnedFd>) -> Result<()> {
    let began = Instant::now();
    let mailbox = Mailbox::new()?;
    let machine = Machine::build(config, &mut Descriptors::new(fds), &mailbox)?;
    eprintln!("built in {:?}", began.elapsed());
    machine.start()?;
    eprintln!("started after {:?}", began.elapsed());
    let mut pressed = false;
    let reason = loop {
        if let Some(reason) = mailbox.take_exit() {
            break reason;
        }
        while let Some(event) = mailbox.take() {
            eprintln!("event: {event:?}");
        }
        if !pressed
            && options
                .button_after
                .is_some_and(|seconds| began.elapsed() >= Duration::from_secs(seconds))
        {
            machine.press_power_button()?;
            pressed = true;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    for seen in machine.stop() {
        eprint!("{}", render(&seen, Style::Plain));
    }
    eprintln!("ended after {:?}: {reason:?}", began.elapsed());
    eprintln!("{:?}", machine.status(machine.run_state()).disks);
    for recorded in strake_observe::recorder().since(0) {
        eprint!("{}", render(&recorded.observation, Style::Plain));
    }
    Ok(())
}

fn open(path: &str) -> Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).open(path);
    Ok(file.os("open", path)?.into())
}

fn read(path: &str) -> Result<OwnedFd> {
    Ok(File::open(path).os("open", path)?.into())
}

/// A tap device by name, without packet information and with virtio-net headers.
fn tap(name: &str) -> Result<OwnedFd> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const FLAGS: i16 = 0x0002 | 0x1000 | 0x4000; // IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
    let fd = open("/dev/net/tun")?;
    let mut request = [0u8; 40];
    for (to, from) in request.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    request[16..18].copy_from_slice(&FLAGS.to_ne_bytes());
    // SAFETY: the request is a whole `ifreq` with a name that ends in a zero.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    if done < 0 {
        return Err(std::io::Error::last_os_error()).os("TUNSETIFF", name);
    }
    Ok(fd)
}
