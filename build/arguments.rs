//! The kernels' argument structs. Their one source is C++; this writes them as Rust, with one computed layout for both.
//!
//! A struct's fields are pointers, which Rust holds as `u64` addresses, integers, floats, arrays of these, and structs
//! of the same kind. A layout may not depend on a template's parameter: those stand behind pointers only.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::constants::{Constants, write_docs};
use crate::cpp::{self, Place, Source, Token, TokenKind};

/// A type of a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Type {
    /// A pointer, with the name of what it points to.
    Pointer(String),
    /// A number: its name in C++ and in Rust, and its bytes.
    Number(&'static str, &'static str, usize),
    /// Another struct.
    Struct(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    pub name: String,
    pub of: Type,
    /// The elements of an array.
    pub array: Option<usize>,
    pub docs: Vec<String>,
    pub place: Place,
    /// Bytes from the struct's beginning.
    pub offset: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Struct {
    pub name: String,
    pub fields: Vec<Field>,
    pub docs: Vec<String>,
    pub place: Place,
    pub size: usize,
    pub alignment: usize,
    /// Whether device memory holds such structs: another struct points to them.
    pub in_memory: bool,
}

const NUMBERS: [Type; 9] = [
    Type::Number("uint64_t", "u64", 8),
    Type::Number("uint32_t", "u32", 4),
    Type::Number("uint16_t", "u16", 2),
    Type::Number("uint8_t", "u8", 1),
    Type::Number("char", "u8", 1),
    Type::Number("int32_t", "i32", 4),
    Type::Number("int", "i32", 4),
    Type::Number("float", "f32", 4),
    Type::Number("double", "f64", 8),
];

/// A struct as the source has it: its tokens, which are read if a kernel takes it.
struct Definition {
    parameters: Vec<String>,
    body: Vec<Token>,
    docs: Vec<String>,
    place: Place,
}

/// The structs that kernels take, and those inside of them.
pub struct Arguments {
    /// Structs before those that contain them.
    pub structs: Vec<Struct>,
}

impl Arguments {
    /// Reads the structs `roots`, of which each is the type of an argument as the source spells it, and all that they
    /// contain.
    ///
    /// # Errors
    /// A text that names the place: a struct that does not exist, or exists twice, or a field that cannot be read.
    pub fn read(sources: &[Source], roots: &BTreeSet<String>, constants: &Constants) -> Result<Self, String> {
        let mut definitions: BTreeMap<String, Vec<Definition>> = BTreeMap::new();
        for source in sources {
            define(source, &mut definitions);
        }
        let mut found = Self { structs: Vec::new() };
        for root in roots {
            let name = root.split('<').next().unwrap_or_default();
            found.read_struct(name, &definitions, constants, &format!("a kernel that takes `{root}`"))?;
        }
        let names: BTreeSet<String> = found.structs.iter().map(|one| one.name.clone()).collect();
        let pointees: Vec<String> = found.structs.iter().flat_map(|one| &one.fields).filter_map(pointee).collect();
        for name in pointees.iter().filter(|&name| definitions.contains_key(name) && !names.contains(name)) {
            found.read_struct(name, &definitions, constants, "a pointer")?;
        }
        for one in &mut found.structs {
            one.in_memory = pointees.contains(&one.name);
        }
        Ok(found)
    }

    pub fn find(&self, name: &str) -> Option<&Struct> {
        self.structs.iter().find(|one| one.name == name)
    }

    fn read_struct(
        &mut self,
        name: &str,
        definitions: &BTreeMap<String, Vec<Definition>>,
        constants: &Constants,
        wanted_by: &str,
    ) -> Result<(), String> {
        if self.find(name).is_some() {
            return Ok(());
        }
        let definition = match definitions.get(name).map(Vec::as_slice) {
            Some([one]) => one,
            Some([first, second, ..]) => {
                return Err(format!("`{name}` is defined twice: in {} and in {}", first.place, second.place));
            }
            _ => return Err(format!("`{name}` is not defined, for {wanted_by}")),
        };
        let mut fields = fields(definition, constants)?;
        let (mut size, mut alignment) = (0usize, 1usize);
        for field in &mut fields {
            let (bytes, align) = match &field.of {
                Type::Pointer(_) => (8, 8),
                Type::Number(_, _, bytes) => (*bytes, *bytes),
                Type::Struct(inner) => {
                    self.read_struct(inner, definitions, constants, &field.place.to_string())?;
                    let inner = self.find(inner).expect("just read");
                    (inner.size, inner.alignment)
                }
            };
            field.offset = size.next_multiple_of(align);
            size = field.offset + bytes * field.array.unwrap_or(1);
            alignment = alignment.max(align);
        }
        let size = size.next_multiple_of(alignment);
        let (docs, place) = (definition.docs.clone(), definition.place.clone());
        self.structs.push(Struct { name: name.into(), fields, docs, place, size, alignment, in_memory: false });
        Ok(())
    }

    /// The structs as Rust, with assertions of their layout.
    pub fn to_rust(&self) -> String {
        let mut text = String::from("// Written by build.rs from the structs that the kernels take.\n");
        for Struct { name, fields, docs, place, size, in_memory, .. } in &self.structs {
            write_docs(&mut text, "", docs, place);
            let mut derives = vec!["Clone", "Copy"];
            if fields.iter().all(|field| field.array.unwrap_or(0) <= 32) {
                derives.push("Default");
            }
            if *in_memory {
                derives.extend(["bytemuck::Pod", "bytemuck::Zeroable"]);
            }
            let derives = derives.join(", ");
            let _ = writeln!(text, "#[repr(C)]\n#[derive({derives})]\npub(crate) struct {name} {{");
            for field in fields {
                for line in &field.docs {
                    let _ = writeln!(text, "    /// {line}");
                }
                let of = match &field.of {
                    Type::Pointer(_) => "u64",
                    Type::Number(_, rust, _) => rust,
                    Type::Struct(name) => name,
                };
                let of = field.array.map_or_else(|| of.to_string(), |count| format!("[{of}; {count}]"));
                let _ = writeln!(text, "    pub(crate) {}: {of},", rust_field(&field.name));
            }
            let _ = writeln!(text, "}}\nconst _: () = {{");
            let differs = |what: &str| format!("{name} of {place}: {what}");
            let _ = writeln!(
                text,
                "    assert!(size_of::<{name}>() == {size}, {:?});",
                differs("its size differs from that in arguments.rs")
            );
            for Field { name: field, offset, .. } in fields {
                let rust = rust_field(field);
                let message = differs(&format!("`{field}` is not where arguments.rs expects it"));
                let _ = writeln!(text, "    assert!(std::mem::offset_of!({name}, {rust}) == {offset}, {message:?});");
            }
            let _ = writeln!(text, "}};\nimpl Arguments for {name} {{\n    const NAME: &'static str = \"{name}\";\n}}");
        }
        text
    }

    /// Assertions for the C++ compiler that the structs of these spellings have the computed layout, and those inside
    /// of them.
    pub fn to_assertions(&self, spellings: &BTreeSet<String>) -> String {
        let mut text = String::from("#include <stddef.h>\n");
        // The type of an array's element is a reference.
        text.push_str("template <class T> struct polder_value { using type = T; };\n");
        text.push_str("template <class T> struct polder_value<T&> { using type = T; };\n");
        let mut names = 0;
        for spelling in spellings {
            self.assert_struct(spelling, spelling.split('<').next().unwrap_or_default(), &mut names, &mut text);
        }
        text
    }

    fn assert_struct(&self, spelling: &str, name: &str, names: &mut usize, text: &mut String) {
        let Some(Struct { fields, place, size, .. }) = self.find(name) else { return };
        let _ = writeln!(
            text,
            "static_assert(sizeof({spelling}) == {size}, \"{name} of {place}: its size differs from that in \
             arguments.rs\");"
        );
        for field in fields {
            let (member, offset) = (&field.name, field.offset);
            let _ = writeln!(
                text,
                "static_assert(offsetof({spelling}, {member}) == {offset}, \"{name} of {}: `{member}` is not where \
                 arguments.rs expects it\");",
                field.place
            );
            if let Type::Struct(inner) = &field.of {
                *names += 1;
                let alias = format!("polder_layout_{names}");
                let element = if field.array.is_some() { "[0]" } else { "" };
                let of = format!("decltype({spelling}::{member}{element})");
                let _ = writeln!(text, "using {alias} = polder_value<{of}>::type;");
                self.assert_struct(&alias, inner, names, text);
            }
        }
    }
}

fn pointee(field: &Field) -> Option<String> {
    match &field.of {
        Type::Pointer(name) => Some(name.clone()),
        _ => None,
    }
}

/// Adds the structs that a source defines, at any depth.
fn define(source: &Source, definitions: &mut BTreeMap<String, Vec<Definition>>) {
    let tokens = cpp::tokens(&source.text);
    for at in 0..tokens.len() {
        let is_struct = tokens[at].is("struct") && tokens.get(at + 2).is_some_and(|token| token.is("{"));
        if !is_struct {
            continue;
        }
        let (mut depth, mut end) = (1, at + 3);
        while end < tokens.len() && depth > 0 {
            depth += i32::from(tokens[end].is("{")) - i32::from(tokens[end].is("}"));
            end += 1;
        }
        let mut first = at;
        let mut parameters = Vec::new();
        if at > 0 && tokens[at - 1].is(">") {
            first = (0..at).rev().find(|&i| tokens[i].is("template")).unwrap_or(at);
            let of_class = (first..at).filter(|&i| tokens[i].is("class")).filter_map(|i| tokens.get(i + 1));
            parameters = of_class.map(|token| token.text.clone()).collect();
        }
        let above = tokens[..first].iter().rev().take_while(|token| token.kind == TokenKind::Comment);
        let mut docs: Vec<String> = above.map(|token| token.text.clone()).collect();
        docs.reverse();
        let place = Place { path: source.path.clone(), line: tokens[at].line };
        let body = tokens[at + 3..end.saturating_sub(1)].to_vec();
        definitions.entry(tokens[at + 1].text.clone()).or_default().push(Definition { parameters, body, docs, place });
    }
}

/// Reads a struct's fields: declarations `[const] type[<...>][*] name[[count]], ...;` and comments, nothing else.
fn fields(definition: &Definition, constants: &Constants) -> Result<Vec<Field>, String> {
    let mut fields: Vec<Field> = Vec::new();
    let mut docs: Vec<String> = Vec::new();
    let body = &definition.body;
    let mut at = 0;
    while at < body.len() {
        if body[at].kind == TokenKind::Comment {
            docs.push(body[at].text.clone());
            at += 1;
            continue;
        }
        let place = Place { line: body[at].line, ..definition.place.clone() };
        let end =
            (at..body.len()).find(|&i| body[i].is(";")).ok_or_else(|| format!("{place}: a field without an end"))?;
        let mut own = std::mem::take(&mut docs);
        let mut next = end + 1;
        if let Some(comment) = body.get(next).filter(|token| token.kind == TokenKind::Trailing) {
            own.push(comment.text.clone());
            next += 1;
        }
        for (name, of, array) in declaration(&body[at..end], &definition.parameters, constants, &place)? {
            fields.push(Field { name, of, array, docs: own.clone(), place: place.clone(), offset: 0 });
        }
        at = next;
    }
    Ok(fields)
}

/// The fields of one declaration.
fn declaration(
    tokens: &[Token],
    parameters: &[String],
    constants: &Constants,
    place: &Place,
) -> Result<Vec<(String, Type, Option<usize>)>, String> {
    let text: Vec<&str> = tokens.iter().map(|token| token.text.as_str()).collect();
    let unreadable = || format!("{place}: `{}` is not a field that Rust could share", text.join(" "));
    let mut at = usize::from(text.first() == Some(&"const"));
    let name = text.get(at).ok_or_else(unreadable)?.to_string();
    at += 1;
    if text.get(at) == Some(&"<") {
        at = (at..text.len()).rev().find(|&i| text[i] == ">").ok_or_else(unreadable)? + 1;
    }
    let pointer = text.get(at) == Some(&"*");
    let of = if pointer {
        at += 1;
        Type::Pointer(name)
    } else if let Some(number) = NUMBERS.iter().find(|number| matches!(number, Type::Number(cpp, ..) if *cpp == name)) {
        number.clone()
    } else if parameters.contains(&name) {
        return Err(format!("{place}: the size of `{}` depends on `{name}`", text.join(" ")));
    } else {
        Type::Struct(name)
    };
    let mut found = Vec::new();
    for declarator in text[at..].split(|word| *word == ",") {
        let (name, array) = match declarator {
            [name] => (name, None),
            [name, "[", count @ .., "]"] => {
                let count = cpp::evaluate(&count.join(" "), &|name| constants.value(name));
                (name, Some(count.map_err(|error| format!("{place}: {error}"))? as usize))
            }
            _ => return Err(unreadable()),
        };
        if !name.chars().all(|c| c.is_alphanumeric() || c == '_') || (pointer && text[at..].contains(&",")) {
            return Err(unreadable());
        }
        found.push((name.to_string(), of.clone(), array));
    }
    Ok(found)
}

/// A field's name in Rust.
fn rust_field(name: &str) -> String {
    let is_keyword = ["in", "type", "match", "move", "ref", "use"].contains(&name);
    if is_keyword { format!("r#{name}") } else { name.to_string() }
}
