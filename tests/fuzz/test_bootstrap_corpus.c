/* Replays what the fuzzer found interesting, and damaged copies of it. The folder: argument, else in the source tree.
 */
#include <dirent.h>
#include <stdio.h>

#include "bootstrap_input.h"
#include "common/check.h"

enum { INPUT_MAX = 1 << 16 };

static void replay(const char *path)
{
    static uint8_t data[INPUT_MAX];
    FILE *file = fopen(path, "rb");
    CHECK(file, "%s cannot be read", path);
    if (!file)
        return;
    size_t size = fread(data, 1, sizeof(data), file);
    fclose(file);
    CHECK(bootstrap_input(data, size) == 0);
    for (size_t i = 0; i < size; i++) { /* every byte changed once, every length */
        data[i] ^= (uint8_t)(1u << (i % 8));
        bootstrap_input(data, size);
        data[i] ^= (uint8_t)(1u << (i % 8));
        uint8_t *exact = malloc(i + 1); /* so that a read past the end is seen */
        if (exact)
            bootstrap_input(memcpy(exact, data, i + 1), i + 1);
        free(exact);
    }
}

int main(int count, char **arguments)
{
    char folder[1024], path[2048];
    const char *source = getenv("EPX_TEST_SOURCE");
    snprintf(folder, sizeof(folder), "%s/tests/fuzz/corpus/bootstrap", source ? source : ".");
    if (count > 1)
        snprintf(folder, sizeof(folder), "%s", arguments[1]);
    DIR *entries = opendir(folder);
    if (!entries)
        SKIP("no corpus folder: give it as an argument, or set EPX_TEST_SOURCE to the source tree");
    int files = 0;
    for (struct dirent *entry; (entry = readdir(entries)) != NULL;) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
        replay(path);
        files++;
    }
    closedir(entries);
    CHECK(files >= 10, "only %d inputs in %s", files, folder);
    printf("%d inputs\n", files);
    return check_done();
}
