//! Numbered fields, and the macro that declares types made of them.

use std::collections::BTreeMap;

use crate::value::{Malformed, Value, put_sized, take_sized};

/// Fields as they are written.
#[derive(Debug, Default)]
pub struct FieldsOut(BTreeMap<u16, Vec<u8>>);

impl FieldsOut {
    /// Writes one field.
    pub fn put<T: Value>(&mut self, number: u16, value: &T) {
        let mut bytes = Vec::new();
        value.put(&mut bytes);
        let before = self.0.insert(number, bytes);
        debug_assert!(before.is_none(), "field {number} is declared twice");
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, value) in self.0 {
            out.extend(number.to_le_bytes());
            put_sized(&mut out, |out| out.extend(value));
        }
        out
    }
}

/// Fields as they are read.
#[derive(Debug)]
pub struct Fields<'a> {
    version: u16,
    fields: BTreeMap<u16, &'a [u8]>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8], version: u16) -> Result<Self, Malformed> {
        let mut fields = BTreeMap::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let cut = || Malformed::new("its last field is cut off");
            let (number, after) = rest.split_first_chunk::<2>().ok_or_else(cut)?;
            let number = u16::from_le_bytes(*number);
            let (value, after) = take_sized(after).ok_or_else(cut)?;
            if fields
                .last_key_value()
                .is_some_and(|(last, _)| *last >= number)
            {
                return Err(Malformed::new(format!("field {number} is out of order")));
            }
            fields.insert(number, value);
            rest = after;
        }
        Ok(Self { version, fields })
    }

    /// Takes a field that exists since version `since`; in an older record it is `otherwise`.
    ///
    /// # Errors
    /// It is missing, or there although its version does not have it, or no such value.
    pub fn take<T: Value>(
        &mut self,
        number: u16,
        name: &str,
        since: u16,
        otherwise: impl FnOnce() -> Option<T>,
    ) -> Result<T, Malformed> {
        let found = self.fields.remove(&number);
        match found {
            Some(bytes) if self.version >= since => {
                T::get(bytes, self.version).map_err(|why| why.within(number, name))
            }
            Some(_) => Err(Malformed::new(format!(
                "field {number} ({name}) does not exist in version {}",
                self.version
            ))),
            None if self.version < since => otherwise()
                .ok_or_else(|| Malformed::new(format!("field {number} ({name}) has no default"))),
            None => Err(Malformed::new(format!(
                "field {number} ({name}) is missing"
            ))),
        }
    }

    pub(crate) fn finish(self) -> Result<(), Malformed> {
        match self.fields.keys().next() {
            Some(number) => Err(Malformed::new(format!("field {number} is unknown"))),
            None => Ok(()),
        }
    }
}

/// Declares types that are saved.
///
/// A `record` stands by itself: it has a kind and a version. A `part` is a value within a record and
/// shares its version. Each field has a number of its own; one that came later says since which
/// version it exists, and what it is in records before.
///
/// ```
/// strake_state::saved! {
///     /// What a counter remembers.
///     pub record SavedCounter("counter", version 2) {
///         /// How far it is.
///         1 => value: u64,
///         /// Whether it counts; those of version 1 always did.
///         2 => counting: bool [since 2, otherwise true],
///     }
/// }
///
/// let mut records = strake_state::Records::default();
/// records.put("c", &SavedCounter { value: 7, counting: false }).unwrap();
/// let mut read = strake_state::Records::decode(&records.encode()).unwrap();
/// assert_eq!(read.take::<SavedCounter>("c").unwrap().value, 7);
/// read.finish().unwrap();
/// ```
#[macro_export]
macro_rules! saved {
    () => {};
    (
        $(#[$doc:meta])*
        $vis:vis record $name:ident($kind:literal, version $version:literal) { $($fields:tt)* }
        $($more:tt)*
    ) => {
        $crate::saved! { @type [$(#[$doc])*] [$vis] $name { $($fields)* } }

        impl $crate::Saved for $name {
            const KIND: &'static str = $kind;
            const VERSION: u16 = $version;
        }

        $crate::saved! { $($more)* }
    };
    (
        $(#[$doc:meta])*
        $vis:vis part $name:ident { $($fields:tt)* }
        $($more:tt)*
    ) => {
        $crate::saved! { @type [$(#[$doc])*] [$vis] $name { $($fields)* } }
        $crate::saved! { $($more)* }
    };
    (
        @type [$($doc:tt)*] [$vis:vis] $name:ident {
            $(
                $(#[$field_doc:meta])*
                $number:literal => $field:ident : $type:ty
                    $([since $since:literal, otherwise $otherwise:expr])?
            ),* $(,)?
        }
    ) => {
        $($doc)*
        #[derive(Debug, Clone, PartialEq, Eq)]
        $vis struct $name {
            $( $(#[$field_doc])* pub $field: $type, )*
        }

        impl $crate::Value for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $crate::private::part_put(out, |fields| {
                    let _ = &fields; // A type may have none.
                    $( fields.put($number, &self.$field); )*
                });
            }

            fn get(bytes: &[u8], version: u16) -> Result<Self, $crate::Malformed> {
                $crate::private::part_get(bytes, version, |fields| {
                    let _ = &fields; // A type may have none.
                    Ok(Self {
                        $( $field: $crate::saved!(
                            @take fields $number $field $([$since $otherwise])?
                        ), )*
                    })
                })
            }
        }
    };
    (@take $fields:ident $number:literal $field:ident) => {
        $fields.take($number, stringify!($field), 1, || None)?
    };
    (@take $fields:ident $number:literal $field:ident [$since:literal $otherwise:expr]) => {
        $fields.take($number, stringify!($field), $since, || Some($otherwise))?
    };
}
