/* Reader of routing files; the format is in docs/PERFORMANCE.md. Trusts nothing that it reads. */
#include "routing_file.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <epx/epx.h>

enum { LINE_BYTES = 65536, FILE_RANKS_MAX = 4096, FILE_TOKENS_MAX = 1 << 24, FILE_EXPERTS_MAX = 1 << 20 };

typedef struct reader {
    FILE *stream;
    const char *path;
    unsigned long line_number;
    char line[LINE_BYTES];
} reader_t;

static char words[512];

static const char *wrong(const reader_t *reader, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    unsigned long line = reader->line_number ? reader->line_number : 1; /* of an empty file */
    int used = snprintf(words, sizeof words, "%s, line %lu: ", reader->path, line);
    if (used >= 0 && (size_t)used < sizeof words)
        vsnprintf(words + used, sizeof words - (size_t)used, format, list);
    va_end(list);
    return words;
}

/* The next line that holds something: comments (#) and empty lines are passed over. NULL at the end. */
static char *next_line(reader_t *reader)
{
    while (fgets(reader->line, sizeof reader->line, reader->stream)) {
        reader->line_number++;
        char *comment = strchr(reader->line, '#');
        if (comment)
            *comment = '\0';
        char *at = reader->line + strspn(reader->line, " \t\r\n");
        if (*at)
            return at;
    }
    return NULL;
}

/* One number of the line, between the bounds; false if there is none. */
static int take_number(char **at, long least, long most, long *number)
{
    char *end = NULL;
    errno = 0;
    long value = strtol(*at, &end, 10);
    if (end == *at || errno || value < least || value > most)
        return 0;
    *at = end;
    *number = value;
    return 1;
}

static int take_word(char **at, const char *word)
{
    char *start = *at + strspn(*at, " \t");
    size_t length = strlen(word);
    if (strncmp(start, word, length) != 0 || !strchr(" \t\r\n", start[length]))
        return 0;
    *at = start + length;
    return 1;
}

static int at_end(const char *at)
{
    return at[strspn(at, " \t\r\n")] == '\0';
}

static const char *read_header(reader_t *reader, routing_file_t *file)
{
    long version, ranks, topk, experts, tokens;
    char *at = next_line(reader);
    if (!at || !take_word(&at, "epx-routing") || !take_number(&at, 1, 1, &version))
        return wrong(reader, "\"epx-routing 1 ranks R topk K experts E\" should stand here");
    if (!take_word(&at, "ranks") || !take_number(&at, 1, FILE_RANKS_MAX, &ranks) || !take_word(&at, "topk") ||
        !take_number(&at, 1, EPX_TOPK_MAX, &topk) || !take_word(&at, "experts") ||
        !take_number(&at, 1, FILE_EXPERTS_MAX, &experts) || !at_end(at))
        return wrong(reader, "\"ranks R topk K experts E\" should follow, with R to %d, K to %d, E to %d",
                     FILE_RANKS_MAX, EPX_TOPK_MAX, FILE_EXPERTS_MAX);
    *file = (routing_file_t){(uint32_t)ranks, (uint32_t)topk, (uint32_t)experts, NULL, 0, NULL};
    file->tokens = calloc((size_t)ranks, sizeof *file->tokens);
    if (!file->tokens)
        return "no memory for the routing file";
    at = next_line(reader);
    if (!at || !take_word(&at, "tokens"))
        return wrong(reader, "\"tokens T0 T1 ...\" should stand here, one number a rank");
    for (long r = 0; r < ranks; r++) {
        if (!take_number(&at, 0, FILE_TOKENS_MAX, &tokens))
            return wrong(reader, "the number of tokens of rank %ld is missing or not in 0 .. %d", r, FILE_TOKENS_MAX);
        file->tokens[r] = (uint32_t)tokens;
        file->total += (uint64_t)tokens;
    }
    return at_end(at) ? NULL : wrong(reader, "more than %ld numbers of tokens", ranks);
}

static const char *read_ids(reader_t *reader, routing_file_t *file)
{
    file->ids = malloc((file->total * file->topk + 1) * sizeof *file->ids);
    if (!file->ids)
        return "no memory for the routing file";
    for (uint64_t token = 0; token < file->total; token++) {
        char *at = next_line(reader);
        if (!at)
            return wrong(reader, "the file ends after %llu tokens; its second line promises %llu",
                         (unsigned long long)token, (unsigned long long)file->total);
        int64_t *ids = file->ids + token * file->topk;
        for (uint32_t k = 0; k < file->topk; k++) {
            long id;
            if (!take_number(&at, -1, (long)file->experts - 1, &id))
                return wrong(reader, "expert %u of %u is missing or not in -1 .. %u", k + 1, file->topk,
                             file->experts - 1);
            for (uint32_t j = 0; j < k; j++)
                if (id >= 0 && ids[j] == id)
                    return wrong(reader, "expert %ld is named twice", id);
            ids[k] = id;
        }
        if (!at_end(at))
            return wrong(reader, "more than %u experts", file->topk);
    }
    return next_line(reader) ? wrong(reader, "more tokens than the second line promises") : NULL;
}

const char *routing_file_read(const char *path, routing_file_t *file)
{
    *file = (routing_file_t){0};
    reader_t *reader = calloc(1, sizeof *reader);
    if (!reader)
        return "no memory for the routing file";
    reader->path = path;
    reader->stream = fopen(path, "r");
    const char *error = NULL;
    if (reader->stream) {
        error = read_header(reader, file);
        if (!error)
            error = read_ids(reader, file);
        if (error && ferror(reader->stream)) { /* a folder, say */
            snprintf(words, sizeof words, "%s cannot be read as a file", path);
            error = words;
        }
        fclose(reader->stream);
    } else {
        snprintf(words, sizeof words, "%s cannot be read: %s", path, strerror(errno));
        error = words;
    }
    free(reader);
    if (error)
        routing_file_fini(file);
    return error;
}

void routing_file_fini(routing_file_t *file)
{
    free(file->tokens);
    free(file->ids);
    *file = (routing_file_t){0};
}
