//! What this crate refuses.

strake_observe::catalog! {
    /// What can be wrong with a spec.
    pub static CATALOG;

    /// A spec file has a problem at a place.
    SpecRefused("api.spec-refused") {
        /// The file's name.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// The column in characters, from 1.
        column: usize,
        /// The key, for example `disk[0].image`.
        key: String,
        /// What is wrong with it.
        reason: String,
        /// What to write instead.
        advice: String,
    }
    text "{file}:{line}:{column}: {key}: {reason}";
    remedy "{advice}";

    /// A spec that came without a file has a problem.
    SpecInvalid("api.spec-invalid") {
        /// The key, for example `disk[0].image`.
        key: String,
        /// What is wrong with it.
        reason: String,
        /// What to write instead.
        advice: String,
    }
    text "{key}: {reason}";
    remedy "{advice}";

    /// A spec has several problems; each is a cause.
    SpecProblems("api.spec-problems") {
        /// The file's name, or what else it came from.
        file: String,
        /// How many.
        count: usize,
    }
    text "{file} has {count} problems";
    remedy "mend each of them, then try again";

    /// A spec could not be written as TOML.
    SpecUnwritable("api.spec-unwritable") {
        /// The serializer's words.
        reason: String,
    }
    text "the spec cannot be written as TOML: {reason}";
    remedy "report this as a defect of Strake";
}
