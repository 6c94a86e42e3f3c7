//! One observation as it happened.

use std::fmt;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Kind;

/// The result of everything in Strake that can fail for a reason outside of the program.
pub type Result<T, E = Observation> = std::result::Result<T, E>;

/// What a component saw when something failed, with what caused it.
///
/// Boxed, so that a `Result` that carries it stays one word wide.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Observation(Box<Record>);

/// The content of an [`Observation`], the same in memory and on every carrier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The stable identifier of its kind, for example `block.write-failed`.
    pub id: String,
    /// One line that says what was seen.
    pub text: String,
    /// One line that says what can be done about it.
    pub remedy: String,
    /// The typed data of its kind.
    #[serde(default)]
    pub data: Map<String, Value>,
    /// When it was seen: milliseconds since the Unix epoch, by the emitter's clock.
    pub at_ms: u64,
    /// The component that saw it: the name of its crate.
    pub component: String,
    /// Where it was seen.
    pub emitter: Emitter,
    /// What it was caused by, in the order in which it was seen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Observation>,
}

/// The place an observation comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Emitter {
    /// The process's name, for example `strake-vmm web1`.
    pub process: String,
    /// Its process identifier as the process itself sees it.
    pub pid: u32,
    /// The thread's name.
    pub thread: String,
}

static PROCESS: OnceLock<String> = OnceLock::new();

/// Names this process in everything it observes from now on. Only the first call counts; without
/// one the name of the executable stands.
pub fn set_process_name(name: impl Into<String>) {
    let _ = PROCESS.set(name.into());
}

impl Emitter {
    fn here() -> Self {
        let process = PROCESS
            .get_or_init(|| {
                std::env::args_os()
                    .next()
                    .and_then(|path| {
                        std::path::Path::new(&path)
                            .file_name()
                            .map(|name| name.to_string_lossy().into_owned())
                    })
                    .unwrap_or_else(|| "unknown".to_owned())
            })
            .clone();
        let thread = std::thread::current();
        Self {
            process,
            pid: std::process::id(),
            thread: thread.name().unwrap_or("unnamed").to_owned(),
        }
    }
}

impl<K: Kind> From<K> for Observation {
    fn from(kind: K) -> Self {
        let data = match serde_json::to_value(&kind) {
            Ok(Value::Object(map)) => map,
            // A kind without fields serialises to null; a field that cannot be expressed in JSON
            // must not turn one failure into another, so the text alone is kept.
            _ => Map::new(),
        };
        let at_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .ok()
            .and_then(|since| u64::try_from(since.as_millis()).ok())
            .unwrap_or(0);
        Self(Box::new(Record {
            id: K::ID.to_owned(),
            text: kind.text(),
            remedy: kind.remedy(),
            data,
            at_ms,
            component: K::COMPONENT.to_owned(),
            emitter: Emitter::here(),
            causes: Vec::new(),
        }))
    }
}

impl Observation {
    /// Its content, to be changed by whoever passes it on in part.
    #[must_use]
    pub fn into_record(self) -> Record {
        *self.0
    }

    /// An observation with this content.
    #[must_use]
    pub fn from_record(record: Record) -> Self {
        Self(Box::new(record))
    }

    /// The stable identifier of its kind.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// One line that says what was seen.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0.text
    }

    /// One line that says what can be done about it.
    #[must_use]
    pub fn remedy(&self) -> &str {
        &self.0.remedy
    }

    /// One value of its typed data.
    #[must_use]
    pub fn datum(&self, name: &str) -> Option<&Value> {
        self.0.data.get(name)
    }

    /// What it was caused by.
    #[must_use]
    pub fn causes(&self) -> &[Observation] {
        &self.0.causes
    }

    /// Everything that it holds.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.0
    }

    /// Whether it is of the kind `K`.
    #[must_use]
    pub fn is<K: Kind>(&self) -> bool {
        self.0.id == K::ID
    }

    /// The first observation of this identifier in the tree, itself included, depth first.
    #[must_use]
    pub fn find(&self, id: &str) -> Option<&Observation> {
        if self.0.id == id {
            return Some(self);
        }
        self.0.causes.iter().find_map(|cause| cause.find(id))
    }

    /// The same observation with at most `levels` of causes below it. What came from another process
    /// may be nested deeper than a JSON reader follows.
    #[must_use]
    pub fn cut_below(mut self, levels: usize) -> Self {
        let causes = std::mem::take(&mut self.0.causes);
        if let Some(below) = levels.checked_sub(1) {
            let cut = causes.into_iter().map(|cause| cause.cut_below(below));
            self.0.causes = cut.collect();
        }
        self
    }

    /// The same observation with one more cause.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Observation>) -> Self {
        self.0.causes.push(cause.into());
        self
    }

    /// The same observation with more causes.
    #[must_use]
    pub fn because_all(mut self, causes: impl IntoIterator<Item = Observation>) -> Self {
        self.0.causes.extend(causes);
        self
    }
}

impl fmt::Debug for Observation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Observation {
    /// One line: the text, then the texts of the first cause of each level.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.text)?;
        if let Some(cause) = self.0.causes.first() {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Observation {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.causes.first().map(|cause| cause as _)
    }
}

/// Puts an observation of the caller's own above the failure of a callee.
pub trait Because<T> {
    /// On failure, the observation that `own` makes, caused by what the callee saw.
    ///
    /// # Errors
    /// The callee's failure, with the caller's own observation above it.
    fn because_of<K: Kind>(self, own: impl FnOnce() -> K) -> Result<T>;
}

impl<T, E: Into<Observation>> Because<T> for Result<T, E> {
    fn because_of<K: Kind>(self, own: impl FnOnce() -> K) -> Result<T> {
        self.map_err(|cause| Observation::from(own()).because(cause))
    }
}
