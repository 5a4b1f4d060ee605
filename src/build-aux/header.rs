//! Generates the C header: a part of build.rs.
//!
//! The generator (cbindgen) prints all constants, then all types, then all
//! functions, each under a comment of at least three lines. A person reads the
//! header by subject, so each module of src/capi becomes a section of its own,
//! and short comments go behind what they describe.

use std::collections::HashSet;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use cbindgen::{Config, DocumentationStyle, Language, SortKey, Style};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The list of modules.
pub const MODULES: &str = "src/capi/mod.rs";
/// What comes before and after the generated declarations.
pub const FRAME: &str = "src/capi/frame.h";

const WIDTH: usize = 80;

/// The modules of the C API that make up the header (the private ones, whose
/// names are re-exported), in the order in which they are listed.
pub fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_to_string(root.join(MODULES))?;
    let names = list.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
    Ok(names.map(|name| PathBuf::from(format!("src/capi/{name}.rs"))).collect())
}

/// The text of the header.
pub fn generate(root: &Path, sources: &[PathBuf], version: &str) -> Result<String> {
    let mut texts = Vec::new();
    for source in sources {
        texts.push(fs::read_to_string(root.join(source))?);
    }
    let structs: HashSet<&str> = texts.iter().flat_map(|text| structs(text)).collect();

    let mut declarations = Vec::new();
    for (source, text) in sources.iter().zip(&texts) {
        let title = text.lines().next().and_then(|line| line.strip_prefix("//! "));
        let title = title.ok_or_else(|| format!("{} has no title", source.display()))?;
        let raw = section(&root.join(source), text, &structs)?;
        let rule = "-".repeat(WIDTH - 7 - title.len());
        declarations.push(format!("/* {rule} {title} */\n\n{}\n", tidy(&raw).trim_end()));
    }
    let frame = fs::read_to_string(root.join(FRAME))?;
    Ok(frame.replace("@VERSION@", version).replace("@DECLARATIONS@\n", &declarations.join("\n")))
}

/// Names of the structs that a module defines for C.
fn structs(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let name = line.strip_prefix("pub struct ")?;
        let end = name.find(|c: char| !c.is_alphanumeric() && c != '_')?;
        name.starts_with("qcow2rs_").then_some(&name[..end])
    })
}

/// The declarations of one module.
fn section(source: &Path, text: &str, all_structs: &HashSet<&str>) -> Result<String> {
    let mut config = Config {
        language: Language::C,
        style: Style::Tag,
        documentation_style: DocumentationStyle::C,
        sort_by: SortKey::None,
        usize_is_size_t: true,
        no_includes: true,
        line_length: WIDTH,
        tab_width: 4,
        ..Config::default()
    };
    config.function.must_use = Some("QCOW2RS_MUST_USE".into());
    let own: Vec<&str> = structs(text).collect();
    // Also those that no function of this module mentions.
    config.export.include = own.iter().map(|name| name.to_string()).collect();
    let foreign = all_structs.iter().filter(|name| !own.contains(name)).chain([&"iovec"]);
    config.export.rename =
        foreign.map(|name| (name.to_string(), format!("struct {name}"))).collect();

    let mut out = Vec::new();
    let bindings = cbindgen::Builder::new().with_config(config).with_src(source).generate()?;
    bindings.write(&mut out);
    Ok(String::from_utf8(out)?)
}

/// A declaration, a member of one, or a line that is neither, and the comment
/// that belongs to it.
struct Item<'a> {
    comment: Vec<&'a str>,
    code: String,
}

/// Takes the generator's output apart.
fn items(raw: &str) -> Vec<Item<'_>> {
    let mut items: Vec<Item<'_>> = Vec::new();
    let mut comment = Vec::new();
    let mut lines = raw.lines();
    while let Some(line) = lines.next() {
        if line.trim() == "/*" {
            comment = lines.by_ref().map(str::trim).take_while(|line| *line != "*/").collect();
            continue;
        }
        match items.last_mut() {
            Some(last) if last.code.ends_with(',') => {
                last.code.push(' ');
                last.code.push_str(line.trim());
            }
            _ if line.is_empty() => {}
            _ => items.push(Item { comment: std::mem::take(&mut comment), code: unsigned(line) }),
        }
    }
    items
}

/// Lays the declarations out as a person would.
fn tidy(raw: &str) -> String {
    let mut out = String::new();
    for run in items(raw).chunk_by(|a, b| kind(a) == kind(b)) {
        let column = run.iter().map(|item| item.code.len()).filter(|len| *len < WIDTH / 2 + 4);
        let column = column.max().unwrap_or(0) + 1;
        for item in run {
            let small = matches!(kind(item), Kind::Constant | Kind::Field);
            let behind = wrap(&item.comment.join(" "), WIDTH - column - 6);
            if small && item.code.len() < column && (1..=3).contains(&behind.len()) {
                out.push_str(&format!("{:column$}/* ", item.code));
                let indent = format!("\n{:1$}", "", column + 3);
                out.push_str(&behind.join(&indent));
                out.push_str(" */\n");
                continue;
            }
            let indent = &item.code[..item.code.len() - item.code.trim_start().len()];
            if let [first, rest @ ..] = item.comment.as_slice() {
                out.push_str(&format!("{indent}/* {first}"));
                rest.iter().for_each(|line| out.push_str(&format!("\n{indent} * {line}")));
                out.push_str(" */\n");
            }
            out.push_str(&parameters(&item.code));
            out.push('\n');
            if kind(item) == Kind::Other && item.code.ends_with(';') {
                out.push('\n');
            }
        }
        if kind(&run[0]) == Kind::Constant {
            out.push('\n');
        }
    }
    out
}

/// Breaks a prototype that is too long, behind its opening parenthesis.
fn parameters(code: &str) -> String {
    let start = code.rfind('(').map_or(0, |at| at + 1);
    if code.len() <= WIDTH || start == 0 {
        return code.to_string();
    }
    let indent = format!("\n{:start$}", "");
    let mut out = code[..start].to_string();
    let mut used = start;
    for parameter in code[start..].split_inclusive(", ") {
        if used > start && used + parameter.trim_end().len() > WIDTH {
            out.truncate(out.trim_end().len());
            out.push_str(&indent);
            used = start;
        }
        out.push_str(parameter);
        used += parameter.len();
    }
    out
}

#[derive(PartialEq, Clone, Copy)]
enum Kind {
    Constant,
    Field,
    Other,
}

fn kind(item: &Item<'_>) -> Kind {
    match &item.code {
        code if code.starts_with("#define ") => Kind::Constant,
        code if code.starts_with("    ") && !code.starts_with("     ") => Kind::Field,
        _ => Kind::Other,
    }
}

/// Breaks text into lines of at most `width` characters, where it has spaces.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_string()),
        }
    }
    lines
}

/// Constants are unsigned in Rust and become so in C.
fn unsigned(line: &str) -> String {
    let constant = line.strip_prefix("#define ").and_then(|rest| rest.split_once(' '));
    match constant {
        Some((name, value)) if value.bytes().all(|b| b.is_ascii_digit()) => {
            format!("#define {name} {value}u")
        }
        Some((name, value)) if value.starts_with("(1 << ") => {
            format!("#define {name} {}", value.replacen("(1 <<", "(1u <<", 1))
        }
        _ => line.to_string(),
    }
}
