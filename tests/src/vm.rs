//! One VM of a test: its spec, its life through `strake`, its guest.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::check;
use crate::failure::{Failure, Outcome, While};
use crate::guest::Guest;
use crate::host::Host;
use crate::place;
use crate::process::{self, Running, wait_until};

/// How long a guest may take from its start to an answer: 5 to 15 s in the lab on an idle machine.
pub const BOOT: Duration = Duration::from_secs(120);

/// What a guest's disk is called in every test.
pub const DISK: &str = "root";

/// A VM's description.
#[derive(Debug, Clone)]
pub struct Shape {
    /// vCPUs.
    pub cpus: u8,
    /// Memory, as in a spec.
    pub memory: &'static str,
    /// The disk's size, as in a spec; no disk if empty.
    pub disk: &'static str,
    /// Whether it has a network interface.
    pub nic: bool,
    /// The `[boot]` table; the small guest if none.
    pub boot: Option<String>,
    /// The disk's image, if it is not to be made in store `a`.
    pub image: Option<String>,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory: "256M",
            disk: "64M",
            nic: true,
            boot: None,
            image: None,
        }
    }
}

/// A VM. Its number tells its network from those of others of the same test.
#[derive(Debug, Clone)]
pub struct Vm {
    /// Its name.
    pub name: String,
    number: u8,
    shape: Shape,
}

impl Vm {
    /// A VM that is described but not yet created.
    #[must_use]
    pub fn new(name: &str, number: u8, shape: Shape) -> Self {
        Self {
            name: name.to_owned(),
            number,
            shape,
        }
    }

    /// Replaces its `[boot]` table.
    pub fn boot_with(&mut self, boot: String) {
        self.shape.boot = Some(boot);
    }

    /// Creates it and starts it, and waits for its guest.
    ///
    /// # Errors
    /// If any of that fails.
    pub fn boot(host: &mut Host, shape: Shape) -> Outcome<Self> {
        let vm = Self::new("vm", 1, shape);
        vm.create(host)?;
        vm.start(host)?;
        vm.wait_for_guest(host)?;
        Ok(vm)
    }

    /// Its spec.
    #[must_use]
    pub fn spec(&self) -> String {
        let shape = &self.shape;
        let mut spec = format!(
            "cpus = {}\nmemory = \"{}\"\n[boot]\n",
            shape.cpus, shape.memory
        );
        match &shape.boot {
            Some(boot) => spec.push_str(boot),
            None => spec.push_str(&format!(
                "from = \"kernel\"\nkernel = \"{}\"\ninitrd = \"{}\"\ncmdline = \"{}\"\n",
                place::kernel(),
                place::initrd(),
                self.cmdline()
            )),
        }
        if !shape.disk.is_empty() {
            let image = shape
                .image
                .clone()
                .unwrap_or_else(|| format!("a:{}-{DISK}.raw", self.name));
            spec.push_str(&format!(
                "[[disk]]\nname = \"{DISK}\"\nimage = \"{image}\"\n"
            ));
            if shape.image.is_none() {
                spec.push_str(&format!("size = \"{}\"\n", shape.disk));
            }
        }
        if shape.nic {
            spec.push_str(&format!(
                "[[nic]]\nname = \"net0\"\ntap = \"{}\"\n",
                self.tap()
            ));
        }
        spec
    }

    /// The kernel command line that gives the guest its address.
    #[must_use]
    pub fn cmdline(&self) -> String {
        // Quiet, because each byte costs an exit; but the traces of a guest in trouble are wanted.
        format!(
            "console=ttyS0 quiet loglevel=5 panic=-1 strake.ip={}/24",
            self.guest().address
        )
    }

    /// Its guest.
    #[must_use]
    pub fn guest(&self) -> Guest {
        Guest {
            address: Ipv4Addr::new(10, 77, self.number, 2),
        }
    }

    /// Its tap device.
    #[must_use]
    pub fn tap(&self) -> String {
        format!("strk-t{}", self.number)
    }

    /// Creates it.
    ///
    /// # Errors
    /// If the daemon refuses it.
    pub fn create(&self, host: &Host) -> Outcome {
        let file = host.folder().join(format!("{}.toml", self.name));
        fs::write(&file, self.spec())?;
        host.strake(&["create", &self.name, "-f", &file.display().to_string()])?
            .good()?;
        Ok(())
    }

    /// Starts it and gives the host's end of its network an address.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start(&self, host: &mut Host) -> Outcome {
        host.strake(&["start", &self.name])?.good()?;
        host.knows_monitor(self.pid(host)?);
        if self.shape.nic {
            let tap = self.tap();
            let address = format!("10.77.{}.1/24", self.number);
            // The tap of an earlier start may still be there, with its address.
            let _ = process::sh(&["ip", "addr", "add", &address, "dev", &tap]);
            process::sh(&["ip", "link", "set", &tap, "up"])?;
        }
        Ok(())
    }

    /// Waits until the guest answers.
    ///
    /// # Errors
    /// If it does not in time; the failure carries its console and the logs.
    pub fn wait_for_guest(&self, host: &Host) -> Outcome {
        let answer = if self.shape.nic {
            self.guest().sh("echo", BOOT).map(drop)
        } else {
            self.wait_for_console(host, "guest: ready", BOOT)
        };
        answer.map_err(|failure| self.with_logs(host, &failure))
    }

    /// Waits until the guest has written these words to its console.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn wait_for_console(&self, host: &Host, words: &str, limit: Duration) -> Outcome {
        wait_until(&format!("the console says '{words}'"), limit, || {
            check!(
                self.state(host)? != "failed",
                "{} failed before its console said '{words}'",
                self.name
            );
            Ok(host.console(&self.name).contains(words))
        })
        .map_err(|failure| self.with_logs(host, &failure))
    }

    /// A failure with the guest's console and the logs of its monitor and daemon.
    #[must_use]
    pub fn with_logs(&self, host: &Host, failure: &Failure) -> Failure {
        let console = host.console(&self.name);
        let from = console.len().saturating_sub(2000);
        let tail: String = console.chars().skip(from).collect();
        Failure::new(format!(
            "{failure}\n-- console:\n{tail}\n-- monitor:\n{}\n-- daemon:\n{}",
            host.monitor_log(&self.name),
            host.daemon_log()
        ))
    }

    /// The whole record, as `strake show --json` gives it.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn show(&self, host: &Host) -> Outcome<Value> {
        host.json(&["show", &self.name])
    }

    /// Its state, as in [`Vm::show`].
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn state(&self, host: &Host) -> Outcome<String> {
        let shown = self.show(host)?;
        Ok(shown
            .get("state")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned())
    }

    /// Its monitor's process.
    ///
    /// # Errors
    /// If none runs.
    pub fn pid(&self, host: &Host) -> Outcome<u32> {
        let shown = self.show(host)?;
        shown
            .get("pid")
            .and_then(Value::as_u64)
            .and_then(|pid| u32::try_from(pid).ok())
            .ok_or_else(|| Failure::new(format!("no monitor in {shown}")))
    }

    /// The file that holds its disk's data: the binding.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn image(&self, host: &Host) -> Outcome<PathBuf> {
        let shown = self.show(host)?;
        shown
            .pointer("/disks/0/image")
            .and_then(Value::as_str)
            .map(PathBuf::from)
            .ok_or_else(|| Failure::new(format!("no disk in {shown}")))
    }

    /// Starts a migration of its disk in the background; more arguments may limit it.
    ///
    /// # Errors
    /// If the client cannot be started.
    pub fn migrate_in_background(&self, host: &Host, to: &str, more: &[&str]) -> Outcome<Running> {
        host.in_background(
            &[
                &["--json", "disk", "migrate", &self.name, DISK, "--to", to],
                more,
            ]
            .concat(),
        )
    }

    /// Migrates its disk and returns the job. The source stays as it was.
    ///
    /// # Errors
    /// If the migration fails.
    pub fn migrate(&self, host: &Host, to: &str) -> Outcome<Value> {
        self.migrate_with(host, to, &[])
    }

    /// Migrates its disk with that method, removes the source, and returns the job.
    ///
    /// # Errors
    /// If the migration fails.
    pub fn migrate_away(&self, host: &Host, to: &str, method: &str) -> Outcome<Value> {
        self.migrate_with(host, to, &["--remove-source", "--method", method])
    }

    fn migrate_with(&self, host: &Host, to: &str, more: &[&str]) -> Outcome<Value> {
        let ran = self
            .migrate_in_background(host, to, more)?
            .wait(Duration::from_secs(180))?;
        let out = ran
            .good()
            .map_err(|failure| self.with_logs(host, &failure))?;
        Ok(serde_json::from_str(&out)?)
    }

    /// Presses the power button and waits for the guest to end.
    ///
    /// # Errors
    /// If it does not end.
    pub fn shut_down(&self, host: &Host) -> Outcome {
        host.in_background(&["stop", &self.name, "--timeout", "180"])?
            .wait(Duration::from_secs(240))?
            .good()
            .map_err(|failure| self.with_logs(host, &failure))?;
        check!(
            self.state(host)? == "stopped",
            "{} is {} after stop",
            self.name,
            self.state(host)?
        );
        Ok(())
    }

    /// Stops it at once.
    ///
    /// # Errors
    /// If the daemon cannot.
    pub fn force_off(&self, host: &Host) -> Outcome {
        host.strake(&["stop", &self.name, "--force"])?
            .good()
            .doing("stopping by force")?;
        Ok(())
    }
}
