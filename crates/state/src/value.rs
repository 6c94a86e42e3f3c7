//! The values that fields hold.

use crate::field::{Fields, FieldsOut};

/// Why bytes are not the value that they should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed(pub String);

impl Malformed {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }

    /// The same within the field `number`, called `name`.
    #[must_use]
    pub fn within(self, number: u16, name: &str) -> Self {
        Self(format!("field {number} ({name}): {}", self.0))
    }
}

/// Something that a field can hold.
pub trait Value: Sized {
    /// Appends it.
    fn put(&self, out: &mut Vec<u8>);

    /// Reads it from exactly these bytes of a record of `version`.
    ///
    /// # Errors
    /// The bytes are none.
    fn get(bytes: &[u8], version: u16) -> Result<Self, Malformed>;
}

/// Bytes without further meaning here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

macro_rules! number {
    ($($type:ty),*) => { $(
        impl Value for $type {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }

            fn get(bytes: &[u8], _: u16) -> Result<Self, Malformed> {
                bytes.try_into().map(Self::from_le_bytes).map_err(|_| {
                    Malformed::new(format!(
                        "{} bytes are no number of {} bytes",
                        bytes.len(),
                        size_of::<Self>()
                    ))
                })
            }
        }
    )* };
}

number!(u8, u16, u32, u64, i64);

impl Value for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn get(bytes: &[u8], _: u16) -> Result<Self, Malformed> {
        match bytes {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(Malformed::new("it is neither true nor false")),
        }
    }
}

impl Value for String {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.as_bytes());
    }

    fn get(bytes: &[u8], _: u16) -> Result<Self, Malformed> {
        Self::from_utf8(bytes.to_vec()).map_err(|_| Malformed::new("it is no text"))
    }
}

impl Value for Blob {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(&self.0);
    }

    fn get(bytes: &[u8], _: u16) -> Result<Self, Malformed> {
        Ok(Self(bytes.to_vec()))
    }
}

impl<const N: usize> Value for [u8; N] {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self);
    }

    fn get(bytes: &[u8], _: u16) -> Result<Self, Malformed> {
        bytes
            .try_into()
            .map_err(|_| Malformed::new(format!("{} bytes instead of {N}", bytes.len())))
    }
}

impl<T: Value> Value for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(self.is_some()));
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn get(bytes: &[u8], version: u16) -> Result<Self, Malformed> {
        match bytes.split_first() {
            Some((0, [])) => Ok(None),
            Some((1, rest)) => T::get(rest, version).map(Some),
            _ => Err(Malformed::new("it is neither there nor absent")),
        }
    }
}

impl<T: Value> Value for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        for item in self {
            put_sized(out, |out| item.put(out));
        }
    }

    fn get(bytes: &[u8], version: u16) -> Result<Self, Malformed> {
        let mut rest = bytes;
        let mut items = Self::new();
        while !rest.is_empty() {
            let (item, after) = take_sized(rest)
                .ok_or_else(|| Malformed::new(format!("item {} is cut off", items.len())))?;
            let item = T::get(item, version)
                .map_err(|why| Malformed(format!("item {}: {}", items.len(), why.0)))?;
            items.push(item);
            rest = after;
        }
        Ok(items)
    }
}

/// Appends what `body` appends, behind its length.
pub(crate) fn put_sized(out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend([0; 4]);
    body(out);
    // What is too long to be counted is found by the limit of a payload before anybody reads it.
    let length = u32::try_from(out.len() - at - 4).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(at..at + 4) {
        place.copy_from_slice(&length.to_le_bytes());
    }
}

/// What stands behind its length, and the rest.
pub(crate) fn take_sized(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)
}

/// For [`saved!`](crate::saved!): a part of a record is a value that consists of fields.
#[doc(hidden)]
pub fn part_put(out: &mut Vec<u8>, write: impl FnOnce(&mut FieldsOut)) {
    let mut fields = FieldsOut::default();
    write(&mut fields);
    out.extend(fields.into_bytes());
}

/// As [`part_put`].
#[doc(hidden)]
pub fn part_get<T>(
    bytes: &[u8],
    version: u16,
    read: impl FnOnce(&mut Fields<'_>) -> Result<T, Malformed>,
) -> Result<T, Malformed> {
    let mut fields = Fields::new(bytes, version)?;
    let value = read(&mut fields)?;
    fields.finish()?;
    Ok(value)
}
