//! Header and crate agree on every prototype, constant and struct.
//!
//! bindgen reads the header as a C compiler does; what it finds is compared
//! with the Rust items of the same names. The comparison is a Rust program that
//! is written here and handed to the compiler, so that types are compared by
//! the one who knows. Nothing has to be listed: what is new in the header is
//! compared, and what the crate lacks does not compile.

mod built;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use bindgen::callbacks::{FieldInfo, IntKind, ParseCallbacks};

/// What bindgen tells on the way.
#[derive(Debug, Default)]
struct Found {
    constants: Vec<String>,
    /// Struct, then its fields.
    structs: BTreeMap<String, Vec<String>>,
}

#[derive(Debug)]
struct Listener(Arc<Mutex<Found>>);

impl ParseCallbacks for Listener {
    fn int_macro(&self, name: &str, _: i64) -> Option<IntKind> {
        if name.starts_with("QCOW2RS_") {
            self.0.lock().unwrap().constants.push(name.to_owned());
        }
        None
    }

    fn field_visibility(&self, info: FieldInfo<'_>) -> Option<bindgen::FieldVisibilityKind> {
        let mut found = self.0.lock().unwrap();
        let fields = found.structs.entry(info.type_name.to_owned()).or_default();
        fields.push(info.field_name.to_owned());
        None
    }
}

/// Rust declarations of what the header declares. The types in `known` are
/// those of the crate.
fn bindings(known: &[String]) -> (String, Found) {
    let found = Arc::new(Mutex::new(Found::default()));
    let mut builder = bindgen::builder()
        .header(built::root().join("include/qcow2rs.h").to_str().unwrap())
        .allowlist_item("(?i)qcow2rs_.*")
        .formatter(bindgen::Formatter::None)
        .parse_callbacks(Box::new(Listener(Arc::clone(&found))));
    for name in known {
        builder = builder.blocklist_type(name).raw_line(format!("pub use qcow2rs::capi::{name};"));
    }
    let text = builder.generate().expect("bindgen reads the header").to_string();
    let found = std::mem::take(&mut *found.lock().unwrap());
    (text, found)
}

/// Name and signature of each function.
fn functions(bindings: &str) -> Vec<(&str, &str)> {
    let declarations = bindings.split("pub fn ").skip(1);
    declarations
        .map(|text| {
            let text = text.split_once(';').expect("a declaration ends").0;
            let (name, _) = text.split_once('(').expect("a function has parameters");
            (name.trim(), &text[name.len()..])
        })
        .collect()
}

/// Struct types that the header declares, opaque ones included.
fn struct_names(bindings: &str) -> Vec<String> {
    let names = bindings.split("pub struct ").skip(1);
    let names = names.filter_map(|text| text.split_whitespace().next());
    names.filter(|name| name.starts_with("qcow2rs_")).map(str::to_owned).collect()
}

/// Compiles a program that uses the crate; nothing is run.
fn compile(name: &str, program: &str) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join(name);
    std::fs::write(&source, program).unwrap();
    let cargo = std::env::var_os("CARGO").expect("set by cargo");
    let rustc = Path::new(&cargo).with_file_name("rustc");
    let libraries = built::libraries();
    let mut command = Command::new(if rustc.exists() { &rustc } else { Path::new("rustc") });
    command.args(["--edition=2024", "--crate-type=lib", "--emit=metadata", "--cap-lints=allow"]);
    command.arg("--out-dir").arg(dir.path());
    command.arg("--extern").arg(format!("qcow2rs={}/libqcow2rs.rlib", libraries.display()));
    command.arg("-L").arg(format!("dependency={}", libraries.display()));
    built::run(command.arg(source));
}

#[test]
fn every_function_has_the_prototype_of_the_header() {
    let (plain, _) = bindings(&[]);
    let mut known = struct_names(&plain);
    known.push("iovec".into());
    let (text, _) = bindings(&known);
    let functions = functions(&text);

    let names: Vec<&str> = functions.iter().map(|(name, _)| *name).collect();
    let mut expected: Vec<String> = built::exports().into_iter().collect();
    expected.sort_by_key(|export| names.iter().position(|name| name == export));
    assert_eq!(names, expected, "the header and include/qcow2rs.map differ");

    let mut program = format!("pub mod c {{ {text} }}\nuse c::*;\n");
    for (name, signature) in functions {
        writeln!(
            program,
            "const _: unsafe extern \"C\" fn{signature} = qcow2rs::capi::{name};\n\
             const _: unsafe extern \"C\" fn{signature} = c::{name};"
        )
        .unwrap();
    }
    compile("prototypes.rs", &program);
}

#[test]
fn every_constant_has_the_value_of_the_header() {
    let (text, found) = bindings(&[]);
    assert!(found.constants.contains(&"QCOW2RS_E_CORRUPT".to_owned()));
    let mut program = format!("pub mod c {{ {text} }}\n");
    for name in &found.constants {
        writeln!(program, "const _: () = assert!(c::{name} == qcow2rs::capi::{name});").unwrap();
    }
    compile("constants.rs", &program);
}

#[test]
fn every_struct_has_the_layout_of_the_header() {
    let (plain, found) = bindings(&[]);
    // Opaque ones have no layout.
    let mut known = struct_names(&plain);
    known.retain(|name| !found.structs.contains_key(name));
    known.push("iovec".into());
    let (text, _) = bindings(&known);

    let mut program = format!(
        "pub mod c {{ {text} }}\n\
         use std::mem::{{align_of, offset_of, size_of}};\n\
         use qcow2rs::capi as rust;\n"
    );
    for (name, fields) in found.structs.iter().filter(|(name, _)| name.starts_with("qcow2rs_")) {
        writeln!(
            program,
            "const _: () = assert!(size_of::<c::{name}>() == size_of::<rust::{name}>());\n\
             const _: () = assert!(align_of::<c::{name}>() == align_of::<rust::{name}>());\n\
             const _: fn(&c::{name}) -> rust::{name} = |c| rust::{name} {{"
        )
        .unwrap();
        // The same fields, all of them, of the same types, ...
        fields.iter().for_each(|field| writeln!(program, "    {field}: c.{field},").unwrap());
        program.push_str("};\n");
        // ... at the same places.
        for field in fields {
            writeln!(
                program,
                "const _: () = assert!(offset_of!(c::{name}, {field}) \
                 == offset_of!(rust::{name}, {field}));"
            )
            .unwrap();
        }
    }
    compile("layouts.rs", &program);
}

#[test]
fn the_version_string_is_that_of_the_package() {
    let header = built::read("include/qcow2rs.h");
    let line = format!("#define QCOW2RS_VERSION_STRING \"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(header.lines().any(|text| text == line), "no line: {line}");
}
