//! The catalog: which observations exist.

use serde::Serialize;

/// One kind of observation: a Rust type with typed data, declared by [`catalog!`](crate::catalog!).
pub trait Kind: Serialize {
    /// The stable identifier, `component.what-was-seen`. Identifiers are never reused.
    const ID: &'static str;

    /// The component that declares it: the name of its crate.
    const COMPONENT: &'static str;

    /// One line that says what was seen, naming the thing.
    fn text(&self) -> String;

    /// What the reader can do about it, one line.
    fn remedy(&self) -> String;
}

/// One line of a crate's catalog, for documentation and for the tests that compare catalogs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The stable identifier.
    pub id: &'static str,
    /// The text, with the names of its data in braces.
    pub text: &'static str,
    /// The remedy, with the names of its data in braces.
    pub remedy: &'static str,
}

/// Declares the observations of a crate: for each a struct with public fields that implements
/// [`Kind`], and a slice of [`Entry`] that lists them all.
///
/// The text and the remedy are format strings over the fields.
///
/// ```
/// strake_observe::catalog! {
///     /// What the example sees.
///     pub static CATALOG;
///
///     /// The store has no room for the disk.
///     StoreFull("example.store-full") {
///         /// The store's name.
///         store: String,
///         /// How many bytes are missing.
///         missing: u64,
///     }
///     text "datastore '{store}' lacks {missing} bytes";
///     remedy "remove files from '{store}' or choose another datastore";
/// }
///
/// let seen: strake_observe::Observation =
///     StoreFull { store: "fast".into(), missing: 4096 }.into();
/// assert_eq!(seen.text(), "datastore 'fast' lacks 4096 bytes");
/// ```
#[macro_export]
macro_rules! catalog {
    (
        $(#[$list_doc:meta])*
        $vis:vis static $list:ident;
        $(
            $(#[$doc:meta])*
            $name:ident($id:literal) {
                $( $(#[$field_doc:meta])* $field:ident : $ty:ty ),* $(,)?
            }
            text $text:literal;
            remedy $remedy:literal;
        )*
    ) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, $crate::private::serde::Serialize)]
            #[serde(crate = "strake_observe::private::serde")]
            $vis struct $name {
                $( $(#[$field_doc])* pub $field: $ty, )*
            }

            impl $crate::Kind for $name {
                const ID: &'static str = $id;
                const COMPONENT: &'static str = env!("CARGO_PKG_NAME");

                fn text(&self) -> String {
                    #[allow(unused_variables)]
                    let Self { $( $field ),* } = self;
                    format!($text)
                }

                fn remedy(&self) -> String {
                    #[allow(unused_variables)]
                    let Self { $( $field ),* } = self;
                    format!($remedy)
                }
            }
        )*

        $(#[$list_doc])*
        $vis static $list: &[$crate::Entry] = &[
            $( $crate::Entry { id: $id, text: $text, remedy: $remedy }, )*
        ];
    };
}
