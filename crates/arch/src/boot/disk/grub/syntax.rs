//! The syntax of GRUB's language, as far as configuration files use it.

use std::rc::Rc;

/// How deep blocks and conditions may be nested.
const MOST_DEPTH: u32 = 32;

/// A piece of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    /// Itself.
    Text(String),
    /// The value of a variable; outside of quotes it is split into words at blanks.
    Variable { name: String, quoted: bool },
}

/// A word before its variables are replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) parts: Vec<Part>,
    /// A quoted word stays, even if it is empty.
    pub(super) quoted: bool,
}

impl Word {
    /// The word, if it has no variables.
    fn plain(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [] => Some(""),
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }

    fn keyword(&self) -> Option<&str> {
        self.plain().filter(|_| !self.quoted)
    }

    fn push(&mut self, letter: char) {
        match self.parts.last_mut() {
            Some(Part::Text(text)) => text.push(letter),
            _ => self.parts.push(Part::Text(letter.into())),
        }
    }
}

/// Statements that belong together.
pub(super) type Block = Rc<Vec<Statement>>;

/// A statement.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// A command with its words, and the block that `menuentry` and `submenu` have.
    Command(Vec<Word>, Option<Block>),
    /// Conditions, each with what is done if its last statement succeeds; a block without
    /// conditions is the `else`.
    If(Vec<(Block, Block)>),
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// A line's end or a semicolon.
    End,
    Open,
    Close,
}

/// Parses a file. What cannot be understood is left out: a boot loader's configuration is better
/// run in part than not at all.
pub(super) fn parse(text: &str) -> Block {
    let tokens = tokens(text);
    let mut parser = Parser {
        rest: tokens.into_iter().peekable(),
        depth: 0,
    };
    let mut all = Vec::new();
    while parser.rest.peek().is_some() {
        all.extend(parser.statements(&[]));
        // A stray end of something: go on behind it.
        parser.rest.next();
    }
    Rc::new(all)
}

fn tokens(text: &str) -> Vec<Token> {
    let mut out = Vec::new();
    let mut rest = text.chars().peekable();
    let mut word: Option<Word> = None;
    while let Some(letter) = rest.next() {
        match letter {
            ' ' | '\t' | '\r' => out.extend(word.take().map(Token::Word)),
            '\n' | ';' | '{' | '}' => {
                out.extend(word.take().map(Token::Word));
                out.push(match letter {
                    '{' => Token::Open,
                    '}' => Token::Close,
                    _ => Token::End,
                });
            }
            '#' if word.is_none() => while rest.next_if(|letter| *letter != '\n').is_some() {},
            '\\' => match rest.next() {
                Some('\n') | None => {}
                Some(letter) => word.get_or_insert_default().push(letter),
            },
            '\'' => {
                let word = word.get_or_insert_default();
                word.quoted = true;
                for letter in rest.by_ref().take_while(|letter| *letter != '\'') {
                    word.push(letter);
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                word.quoted = true;
                double_quoted(word, &mut rest);
            }
            '$' => variable(word.get_or_insert_default(), &mut rest, false),
            other => word.get_or_insert_default().push(other),
        }
    }
    out.extend(word.map(Token::Word));
    out
}

type Letters<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn double_quoted(word: &mut Word, rest: &mut Letters<'_>) {
    while let Some(letter) = rest.next() {
        match letter {
            '"' => return,
            '$' => variable(word, rest, true),
            '\\' => match rest.next() {
                Some(letter @ ('"' | '\\' | '$')) => word.push(letter),
                Some('\n') | None => {}
                Some(letter) => {
                    word.push('\\');
                    word.push(letter);
                }
            },
            other => word.push(other),
        }
    }
}

fn variable(word: &mut Word, rest: &mut Letters<'_>, quoted: bool) {
    let mut name = String::new();
    if rest.next_if_eq(&'{').is_some() {
        name.extend(rest.by_ref().take_while(|letter| *letter != '}'));
    } else {
        while let Some(letter) =
            rest.next_if(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '?'))
        {
            name.push(letter);
        }
    }
    if name.is_empty() {
        word.push('$');
    } else {
        word.parts.push(Part::Variable { name, quoted });
    }
}

struct Parser {
    rest: std::iter::Peekable<std::vec::IntoIter<Token>>,
    depth: u32,
}

impl Parser {
    fn keyword(&mut self) -> Option<&str> {
        match self.rest.peek() {
            Some(Token::Word(word)) => word.keyword(),
            _ => None,
        }
    }

    fn accept(&mut self, keyword: &str) -> bool {
        let found = self.keyword() == Some(keyword);
        if found {
            self.rest.next();
        }
        found
    }

    fn ends(&mut self) {
        while self.rest.next_if_eq(&Token::End).is_some() {}
    }

    /// Statements up to one of the keywords, a closing brace, or the end, which stays.
    fn statements(&mut self, until: &[&str]) -> Vec<Statement> {
        let mut out = Vec::new();
        self.depth += 1;
        loop {
            self.ends();
            let stop = match self.rest.peek() {
                None | Some(Token::Close) => true,
                _ => self.keyword().is_some_and(|word| until.contains(&word)),
            };
            if stop || self.depth > MOST_DEPTH {
                break;
            }
            out.extend(self.statement());
        }
        self.depth -= 1;
        out
    }

    fn statement(&mut self) -> Option<Statement> {
        if self.accept("if") {
            return Some(self.conditions());
        }
        if self.accept("function") {
            self.command();
            return None;
        }
        for word in ["while", "until", "for"] {
            if self.accept(word) {
                // A loop decides nothing that matters here.
                self.statements(&["done"]);
                self.accept("done");
                return None;
            }
        }
        self.command()
    }

    /// What follows `if`.
    fn conditions(&mut self) -> Statement {
        let mut branches = Vec::new();
        loop {
            let condition = Rc::new(self.statements(&["then"]));
            self.accept("then");
            let body = Rc::new(self.statements(&["elif", "else", "fi"]));
            branches.push((condition, body));
            if self.accept("elif") {
                continue;
            }
            if self.accept("else") {
                let body = Rc::new(self.statements(&["fi"]));
                branches.push((Rc::default(), body));
            }
            self.accept("fi");
            return Statement::If(branches);
        }
    }

    /// A command up to the end of the line, with its block if it has one.
    fn command(&mut self) -> Option<Statement> {
        let mut words = Vec::new();
        let mut block = None;
        loop {
            match self.rest.next_if(|token| *token != Token::Close) {
                Some(Token::Word(word)) => words.push(word),
                Some(Token::Open) => {
                    block = Some(Rc::new(self.statements(&[])));
                    self.rest.next_if_eq(&Token::Close);
                    break;
                }
                // A closing brace ends the command without a semicolon, too.
                Some(Token::End | Token::Close) | None => break,
            }
        }
        (!words.is_empty()).then_some(Statement::Command(words, block))
    }
}
