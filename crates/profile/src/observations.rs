//! What goes wrong with profiles.

strake_observe::catalog! {
    /// The observations of profiles.
    pub static CATALOG;

    /// Not TOML.
    ProfileSyntax("profile.syntax") {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
        /// The reader's words.
        reason: String,
    }
    text "{file}:{line}:{column}: {reason}";
    remedy "mend the TOML at this place";

    /// Several problems of one file.
    ProfileProblems("profile.problems") {
        /// The file.
        file: String,
        /// How many.
        count: usize,
    }
    text "{file} has {count} problems";
    remedy "mend each of them";

    /// A key that a profile does not have, or one that it must have.
    UnknownKey("profile.key") {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
        /// What to write.
        advice: String,
    }
    text "{file}:{line}:{column}: {key}: {reason}";
    remedy "{advice}";

    /// A rule about a field that does not exist.
    UnknownField("profile.unknown-field") {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
        /// The path.
        path: String,
        /// What is likely meant.
        advice: String,
    }
    text "{file}:{line}:{column}: there is no field '{path}'";
    remedy "{advice}";

    /// A rule about a field that only the object itself may say.
    FieldNotSteered("profile.field-not-steered") {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
        /// The path.
        path: String,
        /// Why not.
        reason: String,
    }
    text "{file}:{line}:{column}: no profile can say '{path}' here: {reason}";
    remedy "remove the rule, or change the kind that the profile matches";

    /// An operator that the field does not take.
    BadOperator("profile.bad-operator") {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
        /// The path.
        path: String,
        /// The operator.
        operator: String,
        /// How the field's values are merged.
        merge: String,
        /// The operators that it takes.
        takes: String,
    }
    text "{file}:{line}:{column}: '{path}' (merged by {merge}) does not take '{operator}'";
    remedy "use one of: {takes}";

    /// A value that the field cannot hold, for example in a wrong unit.
    BadValue("profile.bad-value") {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
        /// The path.
        path: String,
        /// What is wrong, as the end of a sentence.
        reason: String,
        /// What the field holds.
        wants: String,
    }
    text "{file}:{line}:{column}: '{path}' {reason}";
    remedy "give it {wants}";

    /// A name breaks the rule.
    BadName("profile.bad-name") {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
        /// The name, escaped.
        name: String,
        /// Why.
        reason: String,
    }
    text "{file}:{line}:{column}: '{name}' cannot name a profile: {reason}";
    remedy "choose a name of letters, digits, '-', '_' and '.', for example 'gold'";

    /// A selector that cannot be understood.
    BadMatch("profile.bad-match") {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
        /// What to write.
        advice: String,
    }
    text "{file}:{line}:{column}: {key}: {reason}";
    remedy "{advice}";

    /// A lock on something that cannot be locked.
    BadLock("profile.bad-lock") {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
        /// The path.
        path: String,
        /// Why not.
        reason: String,
    }
    text "{file}:{line}:{column}: '{path}' cannot be locked: {reason}";
    remedy "lock a field that this profile sets, bounds, adds to, removes from or forbids";

    /// Two profiles of one name.
    DuplicateName("profile.duplicate-name") {
        /// The name.
        name: String,
        /// One file.
        first: String,
        /// The other.
        second: String,
    }
    text "{first} and {second} are both named '{name}'";
    remedy "rename one of them";

    /// More than a bound of this host.
    TooMany("profile.too-many") {
        /// Of what.
        what: String,
        /// How many.
        count: usize,
        /// How many may be.
        most: usize,
    }
    text "{count} {what} are too many";
    remedy "there can be at most {most}: join some of them";

    /// Rules of equal priority that cannot both hold.
    Contradiction("profile.contradiction") {
        /// The object.
        object: String,
        /// The field.
        path: String,
        /// One rule: profile, file and line.
        first: String,
        /// What it says.
        first_says: String,
        /// The other.
        second: String,
        /// What it says.
        second_says: String,
        /// The priority of both.
        priority: i32,
    }
    text "'{path}' of {object}: {first} says {first_says}, {second} says {second_says}, both with priority {priority}";
    remedy "give one of the two profiles another priority, or narrow the `match` of one";

    /// Two locks that cannot both hold.
    LockAgainstLock("profile.lock-against-lock") {
        /// The object.
        object: String,
        /// The field.
        path: String,
        /// One rule: profile, file and line.
        first: String,
        /// What it says.
        first_says: String,
        /// The other.
        second: String,
        /// What it says.
        second_says: String,
    }
    text "'{path}' of {object}: {first} locks {first_says}, {second} locks {second_says}";
    remedy "take the field out of the `locks` of one of the two, or narrow the `match` of one";

    /// Fields whose values are shares of each other.
    CyclicReference("profile.cyclic-reference") {
        /// The object.
        object: String,
        /// The way round, with the rules that make it.
        way: String,
    }
    text "{object}: fields refer to each other in a circle: {way}";
    remedy "give one of these fields a value that does not refer to another";

    /// A profile that is about nothing.
    MatchesNothing("profile.matches-nothing") {
        /// The profile.
        profile: String,
        /// Its file.
        file: String,
    }
    text "profile '{profile}' ({file}) matches no object";
    remedy "compare its `match` with the labels that `strake show` tells, or remove it";
}
