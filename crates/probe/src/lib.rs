//! What this host's KVM can do, found out by trying.
//!
//! `/dev/kvm` may open, answer with the right API version and list every capability, and a stock
//! kernel still never reaches its first line of output: there are software KVMs that run ring 3
//! at the processor's own speed and *interpret* ring 0, a thousand times slower, or lack
//! instructions that every kernel uses. No capability tells them apart. So the probe runs them:
//! one vCPU in long mode and ring 0, first each family of privileged instructions by itself
//! ([`guest::FAMILIES`]), then a loop of ordinary ones against the clock.
//!
//! ```text
//! caller's thread                      thread "probe-vcpu"
//!   sends a guest, waits bounded  ──▶    builds VM and vCPU, runs it to its `hlt`
//!   too late: signals the thread  ──▶    KVM_RUN returns EINTR, the thread ends
//! ```
//!
//! The vCPU's thread owns the VM and everything in it; only the verdict comes back. A KVM that
//! does not even obey the signal costs one lost thread, not a hanging caller.

pub mod guest;
mod observations;
mod run;

use std::path::Path;
use std::time::Duration;

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};
use strake_observe::{Observation, OsContext, Result};

pub use observations::*;

/// The API version that every KVM since Linux 2.6.22 has.
pub const KVM_API_VERSION: i32 = 12;

/// A stock kernel runs some two thousand million instructions in ring 0 until its first user
/// process. At this rate, in instructions per second, that takes two minutes; a processor does
/// a hundred times as much, a good emulator five times, an interpreter a tenth.
pub const ENOUGH: u64 = 15_000_000;

/// The longest that one guest of the probe may take. The slowest software KVM met needs a
/// hundredth of it.
pub const GUEST_LIMIT: Duration = Duration::from_secs(4);

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What it means.
    pub verdict: Verdict,
    /// What `KVM_GET_API_VERSION` says, if `/dev/kvm` could be opened.
    pub api_version: Option<i32>,
    /// The capabilities that Strake needs.
    pub capabilities: Vec<Capability>,
    /// Ring-0 instructions per second, if the loop ended.
    pub instructions_per_second: Option<u64>,
    /// The families of privileged instructions that were tried.
    pub families: Vec<Family>,
    /// Why the verdict is not [`Verdict::Stock`].
    pub problem: Option<Observation>,
}

/// What the host's KVM is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Stock kernels run.
    Stock,
    /// Ring 0 is interpreted: a stock kernel would take many minutes to boot. Guests that live in
    /// ring 3 run at full speed.
    SlowRingZero,
    /// Ring 0 lacks instructions that a stock kernel uses.
    MissingInstructions,
    /// There is no usable KVM.
    Missing,
}

/// A capability of KVM that Strake needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// Its name as in `KVM_CAP_…`.
    pub name: String,
    /// What it is for.
    pub purpose: String,
    /// Whether this KVM has it.
    pub present: bool,
}

/// How a family of instructions fared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Family {
    /// What the instructions are.
    pub name: String,
    /// Why they did not run; none if they did.
    pub failure: Option<String>,
}

impl Report {
    /// Whether a stock kernel boots here in reasonable time.
    #[must_use]
    pub fn runs_stock_kernels(&self) -> bool {
        self.verdict == Verdict::Stock
    }

    fn missing(api_version: Option<i32>, capabilities: Vec<Capability>, why: Observation) -> Self {
        Self {
            verdict: Verdict::Missing,
            api_version,
            capabilities,
            instructions_per_second: None,
            families: Vec::new(),
            problem: Some(why),
        }
    }
}

/// The capabilities that the monitor uses, with what for.
const NEEDED: &[(Cap, &str, &str)] = &[
    (Cap::UserMemory, "USER_MEMORY", "guest memory"),
    (
        Cap::Irqchip,
        "IRQCHIP",
        "interrupt controllers in the kernel",
    ),
    (Cap::IrqRouting, "IRQ_ROUTING", "MSI-X vectors"),
    (Cap::SignalMsi, "SIGNAL_MSI", "MSI-X vectors"),
    (Cap::Irqfd, "IRQFD", "interrupts without an exit"),
    (Cap::Ioeventfd, "IOEVENTFD", "doorbells without an exit"),
    (
        Cap::ImmediateExit,
        "IMMEDIATE_EXIT",
        "pausing a vCPU without a race",
    ),
    (Cap::ExtCpuid, "EXT_CPUID", "the guest's processor model"),
    (
        Cap::SetTssAddr,
        "SET_TSS_ADDR",
        "real mode on Intel processors",
    ),
    (Cap::Pit2, "PIT2", "the guest's timer during early boot"),
    (Cap::MpState, "MP_STATE", "starting further vCPUs"),
];

/// Probes `/dev/kvm`. Takes a fraction of a second on a good host, and a few seconds at most on
/// one that hangs.
#[must_use]
pub fn probe() -> Report {
    probe_at(Path::new("/dev/kvm"))
}

/// Probes the KVM device at `path`.
#[must_use]
pub fn probe_at(path: &Path) -> Report {
    let kvm = match open(path) {
        Ok(kvm) => kvm,
        Err(why) => return Report::missing(None, Vec::new(), why),
    };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        let why = WrongApiVersion {
            found: version,
            wanted: KVM_API_VERSION,
        };
        return Report::missing(Some(version), Vec::new(), why.into());
    }
    let capabilities: Vec<Capability> = NEEDED
        .iter()
        .map(|(cap, name, purpose)| Capability {
            name: (*name).to_owned(),
            purpose: (*purpose).to_owned(),
            present: kvm.check_extension(*cap),
        })
        .collect();
    let absent: Vec<&str> = capabilities
        .iter()
        .filter(|cap| !cap.present)
        .map(|cap| cap.name.as_str())
        .collect();
    if !absent.is_empty() {
        let why = CapabilitiesMissing {
            names: absent.join(", "),
        };
        return Report::missing(Some(version), capabilities, why.into());
    }
    let path = path.to_owned();
    judge(version, capabilities, |code, count| {
        run::in_thread(path.clone(), code, count, GUEST_LIMIT)
    })
}

fn open(path: &Path) -> Result<Kvm> {
    let shown = path.display().to_string();
    let name = std::ffi::CString::new(shown.as_bytes())
        .map_err(std::io::Error::from)
        .os("open", &shown)?;
    Kvm::new_with_path(&name)
        .map_err(|errno| std::io::Error::from_raw_os_error(errno.errno()))
        .os("open", &shown)
        .map_err(|cause| {
            Observation::from(NoKvm {
                path: shown.clone(),
            })
            .because(cause)
        })
}

/// Runs the families and the loop with `run` (code, loop count → the time to its end, or why it
/// did not end well) and draws the verdict.
fn judge(
    api_version: i32,
    capabilities: Vec<Capability>,
    run: impl Fn(&'static [u8], u64) -> Result<Duration>,
) -> Report {
    let mut seen = Vec::new();
    let families: Vec<Family> = guest::FAMILIES
        .iter()
        .map(|family| {
            let failure = run(family.code, 0).err().map(|why| {
                let text = why.to_string();
                seen.push(why);
                text
            });
            Family {
                name: family.name.to_owned(),
                failure,
            }
        })
        .collect();
    let lacking: Vec<&str> = families
        .iter()
        .filter(|family| family.failure.is_some())
        .map(|family| family.name.as_str())
        .collect();

    let rate = measure(&run);
    let slow = match &rate {
        Ok(rate) if *rate < ENOUGH => Some(Observation::from(RingZeroSlow {
            rate: *rate,
            enough: ENOUGH,
        })),
        _ => None,
    };
    let (verdict, problem) = if let Err(why) = &rate {
        let own = Observation::from(RingZeroBroken {}).because(why.clone());
        (Verdict::MissingInstructions, Some(own.because_all(seen)))
    } else if !lacking.is_empty() {
        let own = Observation::from(InstructionsMissing {
            families: lacking.join(", "),
        });
        let own = own.because_all(seen).because_all(slow);
        (Verdict::MissingInstructions, Some(own))
    } else if slow.is_some() {
        (Verdict::SlowRingZero, slow)
    } else {
        (Verdict::Stock, None)
    };
    Report {
        verdict,
        api_version: Some(api_version),
        capabilities,
        instructions_per_second: rate.ok(),
        families,
        problem,
    }
}

/// Instructions per second of [`guest::LOOP`]: few of them first, so that an interpreter is
/// recognised quickly, and more while that was too short to measure.
fn measure(run: &impl Fn(&'static [u8], u64) -> Result<Duration>) -> Result<u64> {
    const SHORTEST: Duration = Duration::from_millis(20);
    const MOST: u64 = 40_000_000;
    let mut count = 2_000;
    loop {
        let took = run(guest::LOOP, count)?;
        if took >= SHORTEST || count >= MOST {
            let instructions = u128::from(count) * u128::from(guest::LOOP_LENGTH);
            let nanos = took.as_nanos().max(1);
            return Ok(u64::try_from(instructions * 1_000_000_000 / nanos).unwrap_or(u64::MAX));
        }
        count *= 20;
    }
}

#[cfg(test)]
mod tests;
