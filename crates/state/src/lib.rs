//! Saved-state records: what a component of a machine remembers, in a form that another process,
//! maybe of a newer version, can read.
//!
//! A machine that moves into another process hands over one set of [`Records`]. Each record belongs
//! to one component and says so: the component's name, the record's kind, the version of that kind,
//! and a payload of numbered fields. No component reads another's record.
//!
//! The types that are saved are declared by [`saved!`] and are not the types that run: what is in a
//! record is a decision, and a change of the code does not change a record by accident.
//!
//! # Compatibility
//! * A kind's version grows with each change of its fields. A field that comes with a version says
//!   since when it exists and what it is in a record that is older.
//! * A field's number and type never change and are never used again.
//! * Each version that was ever released has a stored record in its crate's `corpus` folder, which
//!   its tests read ([`corpus`]).
//!
//! # What is refused
//! Everything that is not understood as a whole, by name: an unknown field, a missing one, a newer
//! version, a record that no component took ([`Records::finish`]), damage. The bytes come from
//! another process: nothing in them panics.
//!
//! # On the wire
//! ```text
//! "STRAKEST"  u16 format  u16 0  u32 number of records
//! record:  u8 length, name   u8 length, kind   u16 version   u32 length, payload   u32 CRC-32
//! payload: fields in the order of their numbers: u16 number   u32 length, value
//! ```
//! All numbers are little-endian.

mod checksum;
#[cfg(any(test, feature = "testing"))]
pub mod corpus;
mod field;
pub mod observations;
mod records;
mod value;

pub use field::{Fields, FieldsOut};
pub use records::{NAME_LIMIT, PAYLOAD_LIMIT, RECORD_LIMIT, Records, SET_LIMIT, Saved};
pub use value::{Blob, Malformed, Value};

#[doc(hidden)]
pub mod private {
    pub use crate::value::{part_get, part_put};
}

#[cfg(test)]
mod tests;
