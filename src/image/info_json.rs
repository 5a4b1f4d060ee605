//! What is known of an image as JSON, in the members of `qemu-img info
//! --output=json` (those that it has and we know).

use std::fmt::Write;

use super::info::{Info, LuksInfo, Qcow2Info, StoredReference};
use crate::format::header::{autoclear, compatible, incompatible};

impl Info {
    /// One JSON object. Names that are not UTF-8 are made so, with U+FFFD.
    pub fn to_json(&self) -> String {
        let mut json = Json::default();
        json.object(|json| {
            json.member("virtual-size").number(self.virtual_size);
            json.member("filename").string(&self.file_name);
            if let Some(qcow2) = &self.qcow2 {
                json.member("cluster-size").number(qcow2.cluster_size.into());
            }
            json.member("format").string(self.format.name());
            json.member("actual-size").number(self.allocated_size);
            if let Some(qcow2) = &self.qcow2 {
                if qcow2.crypt_method != 0 {
                    json.member("encrypted").switch(true);
                }
                json.member("format-specific").object(|json| {
                    json.member("type").string("qcow2");
                    json.member("data").object(|json| specific(json, qcow2));
                });
                if let Some(StoredReference { name, format }) = &qcow2.backing {
                    json.member("backing-filename").string(&String::from_utf8_lossy(name));
                    if let Some(format) = format {
                        let format = String::from_utf8_lossy(format);
                        json.member("backing-filename-format").string(&format);
                    }
                }
            }
            let dirty = self
                .qcow2
                .as_ref()
                .is_some_and(|qcow2| qcow2.incompatible & incompatible::DIRTY != 0);
            json.member("dirty-flag").switch(dirty);
        });
        json.text
    }
}

/// "format-specific": version 2 has no feature bits to tell of.
fn specific(json: &mut Json, qcow2: &Qcow2Info) {
    let modern = qcow2.version >= 3;
    json.member("compat").string(if modern { "1.1" } else { "0.10" });
    let compression = if qcow2.compression_type == 0 { "zlib" } else { "zstd" };
    json.member("compression-type").string(compression);
    if modern {
        let lazy = qcow2.compatible & compatible::LAZY_REFCOUNTS != 0;
        json.member("lazy-refcounts").switch(lazy);
    }
    if !qcow2.bitmaps.is_empty() {
        json.member("bitmaps").array(qcow2.bitmaps.iter(), |json, bitmap| {
            json.object(|json| {
                let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
                let flags = flags.iter().filter(|(set, _)| *set);
                json.member("flags").array(flags, |json, (_, flag)| json.string(flag));
                json.member("name").string(&String::from_utf8_lossy(&bitmap.name));
                json.member("granularity").number(bitmap.granularity.into());
            });
        });
    }
    json.member("refcount-bits").number(qcow2.refcount_bits.into());
    match (&qcow2.luks, qcow2.crypt_method) {
        (Some(luks), _) => json.member("encrypt").object(|json| encrypt(json, luks)),
        (None, 1) => {
            json.member("encrypt").object(|json| json.member("format").string("aes"));
        }
        (None, _) => {}
    }
    if modern {
        json.member("corrupt").switch(qcow2.incompatible & incompatible::CORRUPT != 0);
        json.member("extended-l2").switch(qcow2.extended_l2);
    }
    if qcow2.incompatible & incompatible::EXTERNAL_DATA != 0 {
        if let Some(name) = &qcow2.data_file {
            json.member("data-file").string(&String::from_utf8_lossy(name));
        }
        json.member("data-file-raw").switch(qcow2.autoclear & autoclear::RAW_EXTERNAL_DATA != 0);
    }
}

fn encrypt(json: &mut Json, luks: &LuksInfo) {
    json.member("format").string("luks");
    json.member("uuid").string(&luks.uuid);
    json.member("cipher-alg").string(luks.cipher_alg);
    json.member("cipher-mode").string(luks.cipher_mode);
    json.member("ivgen-alg").string(luks.ivgen_alg);
    if let Some(hash) = luks.ivgen_hash_alg {
        json.member("ivgen-hash-alg").string(hash);
    }
    json.member("hash-alg").string(luks.hash_alg);
    json.member("detached-header").switch(false);
    json.member("payload-offset").number(luks.payload_offset);
    json.member("master-key-iters").number(luks.master_key_iters.into());
    json.member("slots").array(luks.slots.iter(), |json, slot| {
        json.object(|json| {
            json.member("active").switch(slot.active);
            json.member("key-offset").number(slot.key_offset);
            if slot.active {
                json.member("iters").number(slot.iters.into());
                json.member("stripes").number(slot.stripes.into());
            }
        });
    });
}

/// A JSON text under construction, laid out for people.
#[derive(Default)]
struct Json {
    text: String,
    depth: usize,
    /// Something stands before the next member.
    comma: bool,
}

impl Json {
    fn object(&mut self, members: impl FnOnce(&mut Json)) {
        self.text.push('{');
        self.depth += 1;
        self.comma = false;
        members(self);
        self.depth -= 1;
        self.line();
        self.text.push('}');
        self.comma = true;
    }

    fn array<T>(&mut self, items: impl Iterator<Item = T>, mut write: impl FnMut(&mut Json, T)) {
        self.text.push('[');
        self.depth += 1;
        let mut any = false;
        for item in items {
            if any {
                self.text.push(',');
            }
            self.line();
            write(self, item);
            any = true;
        }
        self.depth -= 1;
        if any {
            self.line();
        }
        self.text.push(']');
        self.comma = true;
    }

    /// Begins a member; its value follows.
    fn member(&mut self, name: &str) -> &mut Json {
        if self.comma {
            self.text.push(',');
        }
        self.line();
        self.string(name);
        self.text.push_str(": ");
        self
    }

    fn line(&mut self) {
        self.text.push('\n');
        self.text.extend(std::iter::repeat_n("    ", self.depth));
    }

    fn number(&mut self, value: u64) {
        self.literal(&value.to_string());
    }

    fn switch(&mut self, value: bool) {
        self.literal(if value { "true" } else { "false" });
    }

    fn literal(&mut self, text: &str) {
        self.text.push_str(text);
        self.comma = true;
    }

    fn string(&mut self, value: &str) {
        self.text.push('"');
        for c in value.chars() {
            match c {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                // JSON asks for this below 0x20; the other control characters
                // could play tricks on a terminal.
                c if c.is_control() => {
                    // Writing to a string cannot fail.
                    let _ = write!(self.text, "\\u{:04x}", u32::from(c));
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
        self.comma = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::options::Format;

    fn raw() -> Info {
        Info {
            virtual_size: 1 << 20,
            file_length: 1 << 20,
            allocated_size: 4096,
            format: Format::Raw,
            writable: false,
            file_name: "c.raw".into(),
            qcow2: None,
            chain_depth: 0,
            buffer_alignment: 1,
            optimal_io_size: 0,
            discard_alignment: 1,
        }
    }

    fn qcow2(version: u32) -> Qcow2Info {
        Qcow2Info {
            version,
            cluster_size: 65536,
            subcluster_size: 65536,
            extended_l2: false,
            refcount_bits: 16,
            compression_type: 0,
            snapshot_count: 0,
            bitmap_count: 0,
            bitmaps: Vec::new(),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            crypt_method: 0,
            luks: None,
            backing: None,
            data_file: None,
        }
    }

    #[test]
    fn raw_images() {
        let expected = r#"{
    "virtual-size": 1048576,
    "filename": "c.raw",
    "format": "raw",
    "actual-size": 4096,
    "dirty-flag": false
}"#;
        assert_eq!(raw().to_json(), expected);
    }

    #[test]
    fn version_2_with_backing_file() {
        let backing = StoredReference { name: b"a.qcow2".into(), format: Some(b"qcow2".into()) };
        let info = Info {
            format: Format::Qcow2,
            qcow2: Some(Qcow2Info { backing: Some(backing), ..qcow2(2) }),
            ..raw()
        };
        let expected = r#"{
    "virtual-size": 1048576,
    "filename": "c.raw",
    "cluster-size": 65536,
    "format": "qcow2",
    "actual-size": 4096,
    "format-specific": {
        "type": "qcow2",
        "data": {
            "compat": "0.10",
            "compression-type": "zlib",
            "refcount-bits": 16
        }
    },
    "backing-filename": "a.qcow2",
    "backing-filename-format": "qcow2",
    "dirty-flag": false
}"#;
        assert_eq!(info.to_json(), expected);
    }

    #[test]
    fn version_3_tells_its_features() {
        let data = Qcow2Info {
            incompatible: 0b11111,
            compatible: 1,
            autoclear: 2,
            extended_l2: true,
            compression_type: 1,
            crypt_method: 2,
            ..qcow2(3)
        };
        let json = Info { format: Format::Qcow2, qcow2: Some(data), ..raw() }.to_json();
        for member in [
            r#""compat": "1.1""#,
            r#""compression-type": "zstd""#,
            r#""lazy-refcounts": true"#,
            r#""corrupt": true"#,
            r#""extended-l2": true"#,
            r#""data-file-raw": true"#,
            r#""encrypted": true"#,
            r#""dirty-flag": true"#,
        ] {
            assert!(json.contains(member), "{member} is not in {json}");
        }
    }

    #[test]
    fn strings_are_escaped() {
        let mut json = Json::default();
        json.string("a\"b\\c\n\r\t\u{0}\u{1f}\u{7f}\u{9b}\u{e9}\u{1f600}");
        assert_eq!(
            json.text,
            "\"a\\\"b\\\\c\\n\\r\\t\\u0000\\u001f\\u007f\\u009b\u{e9}\u{1f600}\""
        );
        let backing = StoredReference { name: b"\xff\"".into(), format: None };
        let info = Info { qcow2: Some(Qcow2Info { backing: Some(backing), ..qcow2(3) }), ..raw() };
        let json = info.to_json();
        assert!(json.contains("\"backing-filename\": \"\u{fffd}\\\"\""), "{json}");
        assert!(!json.contains("backing-filename-format"), "{json}");
    }
}
