//! `docs/security.md` names tests: each of them is there.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;

/// Names in the text between backticks, in order.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_test_that_the_page_names_is_where_it_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(root.join("docs/security.md")).unwrap();
    let threats = page.split("\n## Threats\n").nth(1).unwrap();
    let mut found = 0;
    let mut columns = Vec::new();
    for line in threats.lines().filter(|line| line.starts_with('|')) {
        // A file in the head of a column holds for the column, one in a cell for the names after it.
        for (column, cell) in line.split('|').enumerate() {
            let mut file: Option<String> = columns.get(column).cloned().flatten();
            for name in names(cell) {
                if name.ends_with(".rs") {
                    let text = fs::read_to_string(root.join(name));
                    file = Some(text.unwrap_or_else(|error| panic!("{name}: {error}")));
                } else if name.len() > 20 {
                    let file = file.as_ref().unwrap_or_else(|| panic!("{name} is in no file"));
                    assert!(file.contains(&format!("fn {name}(")), "{name} is not there");
                    found += 1;
                }
            }
            if line.starts_with("| class ") {
                columns.resize(column + 1, None);
                columns[column] = file;
            }
        }
    }
    assert!(found > 30, "{found} tests");
}
