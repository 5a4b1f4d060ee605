//! The committed header is the one that src/capi makes.

mod built;

#[test]
fn the_committed_header_is_up_to_date() {
    let fresh = concat!(env!("OUT_DIR"), "/qcow2rs.h");
    let fresh = std::fs::read_to_string(fresh)
        .expect("a fresh header: build without QCOW2RS_SKIP_CBINDGEN to run this test");
    let committed = built::read("include/qcow2rs.h");
    for (number, (fresh, committed)) in (1..).zip(fresh.lines().zip(committed.lines())) {
        assert_eq!(
            committed, fresh,
            "include/qcow2rs.h:{number}: build with QCOW2RS_UPDATE_HEADER=1"
        );
    }
    assert!(fresh == committed, "one is longer: build with QCOW2RS_UPDATE_HEADER=1");
}

#[test]
fn every_line_fits_a_terminal() {
    for (number, line) in (1..).zip(built::read("include/qcow2rs.h").lines()) {
        assert!(line.len() <= 80, "include/qcow2rs.h:{number}: {} characters", line.len());
    }
}
