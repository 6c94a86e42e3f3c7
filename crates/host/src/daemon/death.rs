//! What is known of a monitor that has died.
//!
//! It tells nothing itself any more. What speaks for it: how the kernel says it ended, what it had
//! told this daemon shortly before, what it kept in its file of observations (everything that it
//! saw, told or not, see `strake_observe::Ring`), and the last lines of its log.

use std::fs::File;

use strake_observe::{Observation, left_behind};

use super::{Host, now_ms};
use crate::config::show;
use crate::monitor::process::Ending;
use crate::monitor::spawn;
use crate::observations::{MonitorBrokeOut, MonitorDied, MonitorSaid};

/// What a monitor observed this long before its death may have to do with it.
const CAUSE_WINDOW_MS: u64 = 30_000;

/// So many of what it observed last are shown.
const SHOWN: usize = 16;

/// How deep what it kept may be nested.
const LEVELS: usize = 32;

/// How a monitor died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Death {
    /// As the kernel told.
    Seen(Ending),
    /// While nobody looked.
    Unseen,
}

impl Host {
    /// The observation of a monitor's death; `told` is what it had told this daemon before.
    pub(super) fn monitor_died(
        &self,
        vm: &str,
        pid: u32,
        how: Option<Death>,
        told: impl IntoIterator<Item = Observation>,
    ) -> Observation {
        let log = self.config.monitor_log(vm);
        let broke_out = matches!(how, Some(Death::Seen(ending)) if ending.broke_out());
        let died = Observation::from(MonitorDied {
            vm: vm.to_owned(),
            pid,
            how: match how {
                Some(Death::Seen(ending)) => ending.to_string(),
                Some(Death::Unseen) => {
                    "it ended while no daemon ran, or the host was restarted".to_owned()
                }
                None => "how cannot be told, it was not started by this daemon".to_owned(),
            },
        });
        let broke_out = broke_out.then(|| MonitorBrokeOut {
            vm: vm.to_owned(),
            log: show(&log),
        });
        let said = spawn::last_words(&log).map(|lines| MonitorSaid {
            path: show(&log),
            lines,
        });
        // When one died that nobody saw dying is not known, so neither is what was shortly before.
        let since = match how {
            Some(Death::Unseen) => 0,
            _ => now_ms().saturating_sub(CAUSE_WINDOW_MS),
        };
        let kept = self.kept_by(vm);
        died.because_all(broke_out.map(Observation::from))
            .because_all(said.map(Observation::from))
            .because_all(last(told, kept, since))
    }

    /// What the VM's latest monitor kept. It is not trusted: the guest may have taken it over.
    fn kept_by(&self, vm: &str) -> Vec<Observation> {
        let file = File::open(self.config.monitor_observations(vm));
        let kept = file.and_then(|file| left_behind(&file)).unwrap_or_default();
        kept.into_iter()
            .map(|seen| seen.cut_below(LEVELS))
            .collect()
    }
}

/// Both together, each once, the last ones after `since`.
fn last(
    told: impl IntoIterator<Item = Observation>,
    kept: Vec<Observation>,
    since: u64,
) -> Vec<Observation> {
    let mut all: Vec<Observation> = Vec::new();
    for seen in told.into_iter().chain(kept) {
        let record = seen.record();
        let known = all.iter().any(|other| {
            let other = other.record();
            (other.at_ms, &other.id, &other.text) == (record.at_ms, &record.id, &record.text)
        });
        if record.at_ms >= since && !known {
            all.push(seen);
        }
    }
    all.sort_by_key(|seen| seen.record().at_ms);
    all.split_off(all.len().saturating_sub(SHOWN))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(at_ms: u64, vm: &str) -> Observation {
        let mut record = Observation::from(MonitorSaid {
            path: vm.into(),
            lines: String::new(),
        })
        .into_record();
        record.at_ms = at_ms;
        Observation::from_record(record)
    }

    #[test]
    fn what_was_told_and_kept_is_shown_once_and_old_things_are_not() {
        let told = [seen(50, "old"), seen(110, "b")];
        let kept = vec![
            seen(50, "old"),
            seen(105, "a"),
            seen(110, "b"),
            seen(110, "c"),
        ];
        let want = [seen(105, "a"), seen(110, "b"), seen(110, "c")];
        assert_eq!(last(told, kept, 100), want);
        let many = (0..100).map(|at| seen(at, "x"));
        let shown = last(many, Vec::new(), 0);
        assert_eq!(shown.len(), SHOWN);
        assert_eq!(shown.last(), Some(&seen(99, "x")));
    }
}
