//! The one table of fields.
//!
//! Every field that an operator can write about a VM, a disk, an interface, a datastore or the host
//! has one line in [`FIELDS`]: what it holds, how several profiles' values become one, and what a
//! change takes. The documentation page, the JSON Schema, `strake set --dry-run`, profiles and their
//! plans all come from it; what they say can therefore not differ.

mod docs;
mod document;
mod table;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use strake_profile::Schema;

pub use docs::{holds, json_schema, page};
pub use document::{Part, parse_target};
pub use strake_profile::{ChangeClass, Field, Merge, ObjectKind, Steer, Value, ValueKind};
pub use table::{DISK, FIELDS, KINDS, NIC, VM};

/// The schema of Strake's objects.
#[must_use]
pub fn schema() -> &'static Arc<Schema> {
    static SCHEMA: OnceLock<Arc<Schema>> = OnceLock::new();
    SCHEMA.get_or_init(|| Arc::new(Schema::new(KINDS, FIELDS)))
}

/// What a change of the field at `path` takes, if there is such a field.
#[must_use]
pub fn change_class(path: &str) -> Option<ChangeClass> {
    let slot = schema().slot(path)?;
    schema().field(slot.field).map(|field| field.change)
}
