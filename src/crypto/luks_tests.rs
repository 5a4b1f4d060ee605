//! LUKS headers: each field malformed.

use super::*;

fn sample() -> Header {
    let suite = Suite::default();
    let header = Header::new(suite, None, "a-uuid", 1000, [1; SALT], [2; DIGEST]).unwrap();
    let slot = Slot { active: true, iterations: 1234, salt: [3; SALT], ..header.slots[2] };
    header.with_slot(2, slot)
}

#[test]
fn what_is_written_is_read() {
    let header = sample();
    assert_eq!(Header::parse(&header.to_bytes()).unwrap(), header);
    assert_eq!(header.suite, Suite::default());
    assert_eq!(header.payload_offset, 2_068_480);
    assert_eq!(header.slots[7].offset, 1_810_432);
    assert_eq!((header.active(), header.slots[2].iterations), (1, 1234));
    assert_eq!(header.without_key(2).active(), 0);
    assert_eq!(header.suite.header_bytes().unwrap(), 2_068_480);
}

#[test]
fn each_malformed_field_is_refused() {
    let slot = |n: usize| SLOTS_AT + n * SLOT;
    let cases: Vec<(&str, usize, &[u8], ErrorKind)> = vec![
        ("magic", 0, b"X", ErrorKind::BadHeader),
        ("version 2", 7, &[2], ErrorKind::BadHeader),
        ("cipher", 8, b"des", ErrorKind::UnsupportedFeature),
        ("endless cipher", 8, &[b'a'; 32], ErrorKind::BadHeader),
        ("cipher that is no text", 8, &[0xff], ErrorKind::BadHeader),
        ("mode", 40, b"xxx-plain64", ErrorKind::UnsupportedFeature),
        ("mode without IVs", 40, b"xtsxplain64", ErrorKind::BadHeader),
        ("IV generator", 40, b"xts-plain63", ErrorKind::UnsupportedFeature),
        ("essiv without hash", 40, b"xts-essiv\0\0", ErrorKind::BadHeader),
        ("essiv that does not fit", 40, b"xts-essiv:sha1", ErrorKind::UnsupportedFeature),
        ("useless hash", 40, b"xts-plain:xx", ErrorKind::UnsupportedFeature),
        ("endless mode", 40, &[b'-'; 32], ErrorKind::BadHeader),
        ("hash", 72, b"sha3\0\0", ErrorKind::UnsupportedFeature),
        ("endless hash", 72, &[b's'; 32], ErrorKind::BadHeader),
        ("payload in the header", 104, &[0, 0, 0, 7], ErrorKind::BadHeader),
        ("payload in the slots", 104, &[0, 0, 0xf, 0xc7], ErrorKind::BadHeader),
        ("key of 0 bytes", 108, &[0, 0, 0, 0], ErrorKind::UnsupportedFeature),
        ("odd key", 108, &[0, 0, 0, 63], ErrorKind::UnsupportedFeature),
        ("large key", 108, &[0xff; 4], ErrorKind::UnsupportedFeature),
        ("no iterations", 164, &[0; 4], ErrorKind::BadHeader),
        ("state", slot(0), &[0, 0, 0, 0], ErrorKind::BadHeader),
        ("no iterations of a slot", slot(2) + 4, &[0; 4], ErrorKind::BadHeader),
        ("slot in the header", slot(3) + 40, &[0, 0, 0, 1], ErrorKind::BadHeader),
        ("slot behind the end", slot(3) + 40, &[0xff; 4], ErrorKind::BadHeader),
        ("slot in a slot", slot(3) + 40, &[0, 0, 0, 9], ErrorKind::BadHeader),
        ("stripes", slot(7) + 44, &[0, 0, 0xf, 0xa1], ErrorKind::BadHeader),
        ("no stripes", slot(7) + 44, &[0; 4], ErrorKind::BadHeader),
        ("all stripes", slot(7) + 44, &[0xff; 4], ErrorKind::BadHeader),
    ];
    for (what, at, field, kind) in cases {
        let mut bytes = sample().to_bytes();
        put(&mut bytes, at, field);
        assert_eq!(Header::parse(&bytes).map_err(|error| error.kind()), Err(kind), "{what}");
    }
    let bytes = sample().to_bytes();
    assert!(Header::parse(&bytes[..HEADER - 1]).is_err());
}

#[test]
fn what_does_not_go_together_is_refused() {
    let suite = |cipher, mode, ivs| Suite { cipher, mode, ivs, hash: Hash::Sha256 };
    let essiv = IvGenerator::Essiv;
    for (suite, fits) in [
        (suite(Cipher::Aes192, Mode::Xts, IvGenerator::Plain), true),
        (suite(Cipher::Aes192, Mode::Cbc, IvGenerator::Plain), false),
        (suite(Cipher::Cast5, Mode::Cbc, IvGenerator::Plain64), true),
        (suite(Cipher::Cast5, Mode::Xts, IvGenerator::Plain64), false),
        (suite(Cipher::Cast5, Mode::Cbc, essiv(Hash::Md5)), false),
        (suite(Cipher::Aes256, Mode::Xts, essiv(Hash::Md5)), true),
        (suite(Cipher::Aes256, Mode::Xts, essiv(Hash::Sha512)), false),
    ] {
        assert_eq!(suite.check().is_ok(), fits, "{suite:?}");
    }
}
